"""The record of every decision: Arrow files, their digests, and the reader. Knows pyarrow and numpy, not torch.

    schema        the tables, their columns and version
    writer        SelectionLogWriter: create, resume, append, push, sync, checkpoint, close
    reader        SelectionLog: table, dataset, selected, buffer_at, verify, to_parquet

Beneath them: `digest` (pure functions), `encoding` (columns to bytes), `frames` (reading Arrow messages without trust),
`wal`, `sealing`, `manifest`, `journal` (one table of one rank), `state` and `recovery` (what the files say, and putting them in
order), `checkpoints`, `run_file`, `verification`, `parquet`, `files`, `lock`, `layout`. docs/log_format.md is the specification.
"""

"""From JSONL, Parquet, CSV, WebDataset, Hugging Face data sets and text files to MDS.

sources.py   which files, of which kind; their bytes, decompressed
readers.py   from files to blocks, in order (main process)
rows.py      from a block to rows (workers)
schema.py    which columns, stored how
encode.py    from a row to the bytes of its sample (workers)
shards.py    from samples to shards (main process; Streaming's layout)
journal.py   what is finished, and what was rejected
pool.py run.py    the workers; the job
"""

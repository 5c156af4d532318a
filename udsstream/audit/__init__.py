"""Re-derives a run's decisions from its log alone, in numpy: is the record intact, and does each choice follow from what it records?

    report        Finding, AuditReport, and how they are printed
    run           audit(): all checks, in order
    record        chains, manifests, heads and the anchor; the rows of whatever can still be read
    rows          the log's rows as numpy columns, by step, and the attempts' views of the run
    settings      run.json against itself
    decisions     steps and positions; score, choice and schedule
    orders        scores that are places in an order (greedy methods)
    memory        pushes, the memory's digests, and the mean distance to it
    coverage      epochs and places of samples
    data          the streams' indexes and shards (`--data`)
    checkpoint    a Composer checkpoint's word on the log (`--checkpoint`)
    attestation   the result as an in-toto Statement, and one held against the log later (`--attest`, `--verify-attestation`)
    dsse          signed envelopes

Nothing here imports `udsstream.scoring`: every rule is written a second time, from the method's description, so that a fault in the
one is not repeated by the other. docs/auditing.md says what each check proves and what none can.
"""

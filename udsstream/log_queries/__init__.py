"""What people ask of a selection log: the answers (`queries`, `near_duplicates`, `summary`) and their tables (`tables`)."""

"""What people ask of a selection log: answers (`queries`, `near_duplicates`, `summary`), their `tables`, and what samples say (`texts`)."""

"""Convert the logs of agents (traces) to conversations: one row per context that the model saw.

    records of a session ──format──> contexts of steps ──make_rows──> rows with messages, tools and counts

A format is a module that converts the records of one log format. It assigns each record to exactly one category, so the
counts of all rows of a session add up to the number of its records.
"""

"""Functions that inspect data before training: `preview`, `audit`, `stats` and `diff`.

row_views ──> terminal, html_page        one row, token by token
survey    ──> stats, checks, overview    numbers of all rows, from one pass
"""

"""Look: what people see of data before it is trained on. Each module below `views` is one way of looking.

views ──> terminal, page        one row, token by token
survey ──> stats, checks        all rows, by numbers
"""

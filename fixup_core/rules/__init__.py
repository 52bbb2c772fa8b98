"""The rules: what they say (scaling, standards), what they are about (scalars, branches), and who
writes them into a network (init, which returns a report).
"""

"""Where members of a sweep run: a file for each engine, with `submit({folder: command}, workdir, ...)`.

It starts each command, and returns when all have ended; what became of each member stands in its folder.
"""

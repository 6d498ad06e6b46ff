"""How fast the parts are on this machine, each timed as a run uses it, beside what
the machine can do.

Nothing of the program calls these; `python -m llm bench` does, and the scripts in benchmarks/.
"""

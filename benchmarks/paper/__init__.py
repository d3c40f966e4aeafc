"""The paper's figures and numbers, reproduced: `python -m benchmarks paper`.

A *setting* (`settings.py`) says what is trained, a *run* (`runs.py`) trains it and is a JSON file,
a *figure* (`registry.py`) is a list of settings and a way to draw them (`draw.py`), and its
*summary* (`summary.py`) is all of its runs that the picture and the report need. `claims.py` says
when a claim of the paper counts as held, `checks.py` judges it by the summaries.

Source: Dupont, Doucet, Teh, Augmented Neural ODEs, 2019, whose figures the numbers refer to.
"""

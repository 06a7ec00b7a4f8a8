"""What a run, or a finished model, shows of itself.

card.py           the card of a run: data, tokens, FLOPs, hours, evaluation; what only a person knows is left to fill in
comparison.py     runs side by side: last numbers as a table, curves as a picture
byte_page.py      where one model beats another, byte by byte, as a picture over a text
report.py         runs as one HTML page: numbers, curves, settings, costs, samples over time
introspection.py  inside a Transformer: attention weights, log-probabilities of next tokens, nearest vectors
killed_runs.py    kills the real command again and again, and compares every bit of what comes out in the end
sweep.py          many runs over values of settings: a grid, or what Optuna proposes; resumable
"""

"""What can be said about a model.

card.py  the card of a run: data, tokens, FLOPs, hours, evaluation; what only a person knows is left to fill in
"""

"""How the processes of a run find each other, agree and end as one; `lm_jax/distributed.py` is what the rest of the code asks.

cluster.py    which processes this one belongs to, decided from where it is
roll_call.py  processes wait for one another in words: who for whom, and who never came
peers.py      the line between them: one decides for all, all end as one, who differs is named
"""

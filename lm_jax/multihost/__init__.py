"""How the processes of a run find each other, agree and end as one; other code asks `lm_jax/distributed.py`.

cluster.py    which processes this one belongs to, decided from where it is
roll_call.py  processes wait for one another in words: who for whom, and who never came
connection.py process 0 and each other process are connected: messages as lines of JSON
watchdog.py   a step that takes far longer than the last ones is stuck, and says where
peers.py      the line between them: one decides for all, all end as one, who differs is named
"""

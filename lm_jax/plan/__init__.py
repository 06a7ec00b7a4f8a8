"""What is known before a run starts.

counts.py      parameters, FLOPs, bytes by class, time on a device, rows of a microbatch: counted, not measured
inspection.py  the rows of a step as text, by source; a mixture counted against its weights
"""

"""What is known before a run starts.

devices.py       TPUs and GPUs as their makers' sheets describe them, and the topologies that are made of them
counts.py        parameters, FLOPs, bytes by class, rows of a microbatch: counted, not measured
estimate.py      a config on devices that are not here: bytes, seconds at best, and what makes it fit
program_text.py  the text of a compiled program, read: collectives, kernels, cycles, float32 products, large buffers
compile.py       a step compiled for devices that are not here, by libtpu and by the CUDA plugin; targets/ are GPUs for it
command.py       the command: what is counted, then what the compiler says
inspection.py    the rows of a step as text, by source; a mixture counted against its weights
"""

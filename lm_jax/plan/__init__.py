"""What is known before a run starts.

devices.py       TPUs and GPUs as their makers' sheets describe them, and the topologies that are made of them
layer_memory.py  bytes of the layers on a device: kept for the way back, needed by one at a time, weights as they are multiplied
counts.py        parameters, FLOPs, bytes by class, rows of a microbatch: counted, not measured
estimate.py      a config on devices that are not here: bytes, seconds at best, and what makes it fit
program_text.py  the text of a compiled program, read: collectives, kernels, cycles, float32 products, large buffers
compile.py       a step compiled for devices that are not here, by libtpu and by the CUDA plugin; targets/ are GPUs for it
search.py        mesh, microbatch, recomputation and unrolling of the fastest step: all counted, the best compiled
budget.py        which size a number of FLOPs trains best, on how many tokens; the experiment nearest to it
compare.py       two configs on the same devices, side by side
page.py          a plan as one HTML page with pictures
command.py       the command: what is counted, then what the compiler says
inspection.py    the rows of a step as text, by source; a mixture counted against its weights
"""

"""Work that a GPU replays instead of a launch for each kernel.

A training step of a small model makes thousands of short kernels, and launching them takes ten
times as long as computing them. A CUDA graph is recorded once for each shape of the inputs. On
other devices the work is called as it is.

Used by `pocket.py`; nothing to run here.
"""

import contextlib

import torch


class Graphs:
    """Calls work on tensors: the first time as it is, later as a graph captured for its shapes.

    Work reads its inputs, its own parameters and buffers, writes to buffers that stay where they
    are (gradients, weights, states of optimisers), and gives back a tuple of tensors.
    """

    def __init__(self, device: str):
        self.on_gpu = torch.device(device).type == "cuda"
        self.seen: set = set()
        self.captured: dict = {}
        if self.on_gpu:
            self.stream = torch.cuda.Stream()
            self.pool = torch.cuda.graph_pool_handle()
            # its plans are made anew for each shape, which takes longer than they save
            torch.backends.cuda.enable_cudnn_sdp(False)

    def own_stream(self):
        """A context in which all of the device's work of a run belongs: captures need it."""
        return torch.cuda.stream(self.stream) if self.on_gpu else contextlib.nullcontext()

    def __call__(self, name, work, *inputs):
        """What work(*inputs) gives back; `name` and the shapes of the inputs tell graphs apart."""
        key = (name, *(tuple(x.shape) for x in inputs))
        if not self.on_gpu or key not in self.seen:  # the first call also warms up
            self.seen.add(key)
            return work(*inputs)
        if key not in self.captured:
            fixed = tuple(x.clone() for x in inputs)
            graph = torch.cuda.CUDAGraph()
            # torch.cuda.graph would also collect garbage and empty the cache, each time
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                outputs = work(*fixed)
            finally:
                graph.capture_end()
            self.captured[key] = graph, fixed, outputs
        graph, fixed, outputs = self.captured[key]
        for kept, given in zip(fixed, inputs, strict=True):
            kept.copy_(given)
        graph.replay()
        return tuple(x.clone() for x in outputs)  # the next replay writes over them

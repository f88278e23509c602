"""CUDA graphs, which a GPU replays instead of launching each kernel.

A training step of a small model has thousands of short kernels. Launching them takes ten times as
long as computing them. One graph is captured for each shape of the inputs. On other devices the
function is called without a graph.

`pocket.py` imports this module; it is not run.
"""

import contextlib

import torch


class Graphs:
    """Calls a function of tensors: the first time directly, later by the graph of its input shapes.

    The function returns a tuple of tensors. It may read its inputs, parameters and buffers, and
    write to tensors that keep their address (gradients, weights, states of optimisers).
    """

    def __init__(self, device: str):
        self.on_gpu = torch.device(device).type == "cuda"
        self.seen: set = set()
        self.captured: dict = {}
        if self.on_gpu:
            self.stream = torch.cuda.Stream()
            self.pool = torch.cuda.graph_pool_handle()
            # cuDNN plans attention anew for each shape, which takes longer than it saves
            torch.backends.cuda.enable_cudnn_sdp(False)

    def own_stream(self):
        """A context for all work of a run on the device. Captures need a stream of their own."""
        return torch.cuda.stream(self.stream) if self.on_gpu else contextlib.nullcontext()

    def __call__(self, name, work, *inputs):
        """Return work(*inputs). Each combination of `name` and input shapes has its own graph."""
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
        for fixed_input, new_input in zip(fixed, inputs, strict=True):
            fixed_input.copy_(new_input)
        graph.replay()
        return tuple(x.clone() for x in outputs)  # the next replay writes over them

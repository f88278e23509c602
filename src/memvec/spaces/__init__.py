"""Spaces beside the input: where else the numbers of a vector can stand.

Each is a reading of a model (`memvec.model.reading`) under a name of the registry's kind `space`,
made from a model and options: a recipe's record, or what a file keeps. Nothing in the core imports
them; a recipe names them.

    from memvec import register
    from memvec.model.reading import Prefix

    @register("space", "mine")
    class Mine(Prefix):
        space = "mine"
        def __init__(self, lm, options): ...
        def numbers(self, lm): ...                    # W
        def begun_at(self, lm, vectors): ...          # (K, D) -> (K, W)
        def inputs(self, lm, vectors, ids, start): ...
        def opening(self, lm, vectors, given): ...
"""

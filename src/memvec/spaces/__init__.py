"""Spaces other than `inputs`: other numbers that are trained in place of an input's D numbers.

A space is a reading of a model (`memvec.model.reading`), registered under the kind `space`. It is
built from a model and options, which come from a recipe's record or from a file. The core imports
no space; a recipe selects one by name. Your own space:

    from memvec import register
    from memvec.model.reading import Reading

    @register("space", "mine")
    class Mine(Reading):
        space = "mine"
        def __init__(self, lm, options): ...
        def numbers(self, lm): ...                    # W
        def begun_at(self, lm, vectors): ...          # (K, D) -> (K, W)
        def inputs(self, lm, vectors, ids, start_rule): ...
        def opening(self, lm, vectors, given): ...
"""

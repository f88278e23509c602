"""What a model brings with it: what stands around its vectors, and files beside its weights.

    around.py          in front of the vectors nothing or BOS, after them a trigger
    triggers.py        triggers by name, and the file of a crammed one
    encoder.py         what a one-pass encoder is
    encoder_files.py   the files of encoders, in the model's folder or elsewhere

How triggers and encoders are trained is above this: `memvec.usable`, `memvec.encoders`.
"""

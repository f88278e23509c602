"""Companions of a model: inputs around its vectors, and files of triggers and encoders.

    around.py          the front (inputs in front of the vectors) and the trigger (after them)
    triggers.py        triggers by name, and the file of a crammed trigger
    encoder.py         the interface of one-pass encoders
    encoder_files.py   the files of encoders, in the model's folder or elsewhere

Training is elsewhere: of triggers in `memvec.usable`, of encoders in `memvec.encoders`.
"""

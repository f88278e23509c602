"""The choices of a training run. Each field is a flag of the command line of `pocket.py`.

Used by `pocket.py`; nothing to run here.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Steps, batch sizes in tokens, learning rates, and shares of the tasks, of one run."""

    trunk_steps: int = 200
    """Steps of ordinary text before the memory task begins."""
    steps: int = 1500
    """Steps in all, including trunk and decay."""
    minutes: float = 0.0
    """Training ends after this time, with all parts of the plan shortened alike. 0: no limit."""
    decay_share: float = 0.2
    """Share of the steps, at the end, over which the learning rate falls to zero."""
    warmup_steps: int = 40
    """Steps over which the learning rate rises to its full value."""
    trunk_tokens: int = 4096
    """Ordinary tokens per step in the trunk, where there is no memory task."""
    text_tokens: int = 2048
    """Ordinary tokens per step beside the memory task."""
    memory_tokens: int = 4096
    """Positions per step of the memory task, encoder and decoder passes together."""
    lr_matrices: float = 2e-3
    """Learning rate of the layers' matrices (Muon)."""
    lr_rest: float = 3e-3
    """Learning rate of embedding, norms and summary (AdamW)."""
    lr_encoder: float = 1e-3
    """Learning rate of the encoder's linear map (AdamW)."""
    max_vectors: int = 4
    """K is drawn from COUNTS (`lengths.py`), up to this."""
    single_share: float = 0.35
    """Share of memory steps with K = 1. Each other K has an equal share of the rest."""
    least_share: float = 0.8
    """The target length of K vectors is at least this share of K times that of one vector."""
    first_target: float = 7.0
    """Target length at the start, in tokens per vector."""
    rise_above: float = 0.88
    """The target length rises if the teacher-forced accuracy near it is above this."""
    fall_below: float = 0.7
    """The target length falls if the teacher-forced accuracy near it is below this."""
    shortest: float = 0.5
    """Passage lengths are drawn from this multiple of the target length on."""
    longest: float = 1.4
    """Passage lengths are drawn up to this multiple of the target length, before `wide_from`."""
    short_share: float = 0.0
    """Share of memory steps with shorter passages, down to four tokens, each octave equally often.

    Without them, an encoder whose target length has become long gets worse at short passages.
    """
    wide_from: int = 500
    """Step from which `longest_wide` replaces `longest`."""
    longest_wide: float = 3.0
    """Long passages teach more, once short ones are given back."""
    noise: float = 0.04
    """Gaussian noise on the vectors, as a share of their RMS: vectors nearby should decode too."""
    odd_share: float = 0.1
    """Share of passages that are not running text."""
    most_tokens: int = 64
    """Maximum number of a passage's tokens per vector."""
    trigger_share: float = 0.0
    """Share of memory steps in which <s> stands between the vectors and the passage."""
    use_share: float = 0.0
    """Share of memory steps that train the model to go on from vectors as from their passage."""
    use_tokens: int = 48
    """Tokens after the passage on which the two are compared in such a step."""
    inner_share: float = 0.0
    """Share of memory steps in which the vectors first take `inner_steps` steps of descent."""
    inner_steps: int = 2
    """Steps of descent on the vectors in such a step."""
    inner_rate: float = 0.4
    """Length of the first of these steps, as a share of the vector's RMS. It falls to zero."""
    long_crop: int = 512
    """Every fourth step reads ordinary text in crops of so many tokens, the others of 256."""
    seed: int = 0
    """Seed of the weights and of what each step draws."""
    checkpoint_every: int = 100
    """Steps between two checkpoints."""
    log_every: int = 10
    """Steps between two lines of the log."""

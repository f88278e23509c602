"""The choices of a training run. Each field is an option of the command line of `pocket.py`.

The string below a field is the help of its option. `pocket.py` imports this module; it is not run.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Steps, batch sizes in tokens, learning rates, and shares of the tasks, of one run."""

    trunk_steps: int = 200
    """Steps of ordinary text before the memory task begins."""
    steps: int = 1500
    """All steps, including trunk and decay."""
    minutes: float = 0.0
    """Training ends after this time; all parts are shortened in proportion. 0: no limit."""
    decay_share: float = 0.2
    """Share of the steps, at the end, over which the learning rate falls to zero."""
    warmup_steps: int = 40
    """Steps over which the learning rate rises to its full value."""
    trunk_tokens: int = 4096
    """Ordinary tokens per step in the trunk, where there is no memory task."""
    text_tokens: int = 2048
    """Ordinary tokens per step after the trunk, in addition to the memory task."""
    memory_tokens: int = 4096
    """Positions per step of the memory task, encoder and decoder passes together."""
    lr_matrices: float = 2e-3
    """Learning rate of the layers' matrices (Muon)."""
    lr_rest: float = 3e-3
    """Learning rate of embedding, norms and the encoder's summary embedding (AdamW)."""
    lr_encoder: float = 1e-3
    """Learning rate of the encoder's linear map (AdamW)."""
    max_vectors: int = 4
    """Largest K. It is drawn from COUNTS (`lengths.py`)."""
    single_share: float = 0.35
    """Share of memory steps with K = 1. The other K have equal shares of the rest."""
    least_share: float = 0.8
    """The target length of K vectors is at least this share of K times that of one vector."""
    first_target: float = 7.0
    """Target length at the start, in tokens per vector."""
    rise_above: float = 0.88
    """The target length rises if the teacher-forced accuracy near it is above this."""
    fall_below: float = 0.7
    """The target length falls if the teacher-forced accuracy near it is below this."""
    shortest: float = 0.5
    """Smallest passage length that is drawn, as a multiple of the target length."""
    longest: float = 1.4
    """Largest passage length that is drawn before `wide_from`, as a multiple of the target."""
    short_share: float = 0.0
    """Share of memory steps with short passages, from four tokens on, uniform on a log scale.

    Without them, an encoder whose target length has become long gets worse at short passages.
    """
    wide_from: int = 500
    """Step from which `longest_wide` replaces `longest`."""
    longest_wide: float = 3.0
    """Largest passage length from `wide_from` on: longer passages teach more at that time."""
    noise: float = 0.04
    """Gaussian noise on the vectors, as a share of their RMS, so that near vectors decode too."""
    odd_share: float = 0.1
    """Share of passages that are not running text (`corpus.passage_batch`)."""
    most_tokens: int = 64
    """Maximum number of a passage's tokens per vector."""
    trigger_share: float = 0.0
    """Share of memory steps in which <s> is between the vectors and the passage."""
    use_share: float = 0.0
    """Share of memory steps that train the model to continue after vectors as after their text."""
    use_tokens: int = 48
    """Tokens after the passage in such a step, whose predictions are compared."""
    inner_share: float = 0.0
    """Share of memory steps in which the vectors first take `inner_steps` steps of descent."""
    inner_steps: int = 2
    """Steps of descent on the vectors in such a step."""
    inner_rate: float = 0.4
    """Length of the first of these steps, as a share of the vector's RMS. It falls to zero."""
    long_crop: int = 512
    """Tokens of the crops of ordinary text in every fourth step. Other steps have 256."""
    seed: int = 0
    """Seed of the weights and of what each step draws."""
    checkpoint_every: int = 100
    """Steps between two checkpoints."""
    log_every: int = 10
    """Steps between two lines of the log."""

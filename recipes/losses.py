"""The three losses: of ordinary text, of passages given back from vectors, and of use as context.

Letters in shapes: B passages or crops, K [mem] vectors, T tokens of a passage, C tokens that follow
it, D width, V vocabulary.

`pocket.py` imports this module; it is not run.
"""

import torch
import torch.nn.functional as F

from corpus import BOS
from decoder import Decoder
from encoder import Encoder
from recipe import Recipe


def embed(model: Decoder, ids):
    """Input embeddings (B, T, D) of ids (B, T), in bfloat16, the dtype of the residual stream."""
    # The backward pass of F.embedding sorts the ids, which takes longer.
    rows = model.embedding.index_select(0, ids.flatten())
    return rows.view(*ids.shape, -1).bfloat16()


def text_loss(model: Decoder, ids):
    """Mean cross-entropy of crops ids (B, T), in nats per token."""
    hidden = model(embed(model, ids)[:, :-1])
    logits = F.linear(hidden, model.embedding)
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def passage_logits(model: Decoder, vectors, embedded, trigger: bool):
    """Logits (B, T, V) of a passage's tokens, embedded (B, T, D), after vectors (B, K, D).

    With `trigger`, <s> is between the vectors and the passage.
    """
    parts = [vectors.to(embedded.dtype), embedded[:, :-1]]
    if trigger:
        parts.insert(1, embed(model, embedded.new_full((len(embedded), 1), BOS, dtype=torch.long)))
    inputs = torch.cat(parts, dim=1)
    return F.linear(model(inputs)[:, -embedded.shape[1] :], model.embedding)


def descended(model: Decoder, vectors, embedded, ids, recipe: Recipe, trigger: bool):
    """The vectors (B, K, D) after `inner_steps` steps of descent on their passages ids (B, T).

    The length of each step is a share of the vector's RMS and does not depend on the size of its
    gradient. The backward pass treats the steps as the identity.
    """
    current = vectors.detach()
    rms = current.float().pow(2).mean(-1, keepdim=True).sqrt()
    for step in range(recipe.inner_steps):
        leaf = current.requires_grad_()
        logits = passage_logits(model, leaf, embedded.detach(), trigger)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten(), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, leaf)
        gradient = gradient.float()
        direction = gradient / gradient.pow(2).mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
        rate = recipe.inner_rate * (1 - step / recipe.inner_steps)
        current = (current - rate * rms * direction).detach()
    return vectors + (current - vectors.detach())


def noisy(vectors, noise, share: float):
    """The vectors (B, K, D) plus noise (B, K, D) times a share of the RMS of all vectors."""
    rms = vectors.detach().float().pow(2).mean().sqrt()
    return vectors + share * rms * noise


def memory_loss(model: Decoder, encoder: Encoder, ids, noise, recipe: Recipe, *, inner, trigger):
    """Encode passages ids (B, T) into K vectors each and decode them, teacher-forced.

    Returns the mean cross-entropy in nats per token, and which arg-maxes are right, bool (B, T).
    noise (B, K, D) is drawn from a standard normal distribution. With `inner` the vectors take
    steps of descent before they are decoded.
    """
    K = noise.shape[1]
    embedded = embed(model, ids)
    vectors = encoder(model, embedded, K)
    if inner:
        vectors = descended(model, vectors, embedded, ids, recipe, trigger)
    logits = passage_logits(model, noisy(vectors, noise, recipe.noise), embedded, trigger)
    loss = F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten())
    return loss, logits.detach().argmax(-1) == ids


def use_loss(model: Decoder, encoder: Encoder, ids, following, noise, recipe: Recipe):
    """KL divergence of the predictions after vectors from those after the text, nats per token.

    The predictions are those of the tokens `following` (B, C), which follow passages ids (B, T) in
    the corpus. One side reads <s> and the passage, and gets no gradient; the other side reads the K
    vectors of the passage. The first of these tokens does not count, because directly after the
    vectors the model is trained to give back the passage. noise (B, K, D) is drawn from a standard
    normal distribution.
    """
    K = noise.shape[1]
    embedded, after = embed(model, ids), embed(model, following)
    vectors = noisy(encoder(model, embedded, K), noise, recipe.noise)
    vector_inputs = torch.cat((vectors.to(embedded.dtype), after[:, :-1]), dim=1)
    logits = F.linear(model(vector_inputs)[:, K:], model.embedding)
    with torch.no_grad():
        bos = embed(model, ids.new_full((len(ids), 1), BOS))
        text_inputs = torch.cat((bos, embedded, after[:, :-1]), dim=1)
        after_text = F.linear(model(text_inputs)[:, 1 + ids.shape[1] :], model.embedding)
    return F.kl_div(
        logits.float().log_softmax(-1).flatten(0, 1),
        after_text.float().log_softmax(-1).flatten(0, 1),
        log_target=True,
        reduction="batchmean",
    )

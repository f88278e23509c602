"""Language modelling sentence by sentence: latents, and a model that predicts the next one."""

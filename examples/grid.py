"""The library in a few lines: a probe grid on part of the shipped set, and its direction in TransformerLens hooks."""

import torch

from interp import chat, data, models
from interp.analyses import grid
from interp.analyses.grid_plot import plot

subject = models.load("smollm2")  # or a folder, a PEFT adapter, a Hub id
rated = data.load("pocketfeedback", rows=80)  # or a file, a Hub id
encoder = chat.Encoder(subject.tokenizer)
result = grid.compute(subject, rated, encoder, grid.Settings(layers=(10, 20), positions=("last", "mean"), draws=200))
print(result.facts["finding"])
print(result.to_frame()[["score", "prediction", "tfidf_words"]].head())
chart = plot(result)["grid"]  # an Altair chart; a notebook draws it

# A probe's hook name and direction drop straight into TransformerLens: activation addition, +3 sd.
probe = result.probe
ids = torch.tensor([encoder.encode(chat.messages_of("What is the capital of France?", "Paris.")).ids])
mask = torch.ones_like(ids)
steer = 3 * probe.projection_sd * probe.unit
with torch.inference_mode():
    plain = subject.bridge(ids, attention_mask=mask)
    with subject.bridge.hooks(fwd_hooks=[(probe.hook_name, lambda value, hook: value + steer)]):
        steered = subject.bridge(ids, attention_mask=mask)
print(f"largest change of a logit at the end: {(steered - plain)[0, -1].abs().max():.2f}")

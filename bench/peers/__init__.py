"""Other drag editors beside this one, in one run: the same picture, drags, weights and device, one timer.

A peer runs from a checkout that its user already has, in a process and, if wanted, a Python of its own; nothing of it
comes with this package and the checkout is never written to. What stands between is an adapter, one small file:

    NAME = "GoodDrag"                         what the table calls it
    NEEDS = {"mask": "...", "lora": "..."}    what an edit wants beside picture and drags: mask, prompt, lora, readout
    PUBLISHED = {"latent_lr": 0.02, ...}      the settings that its authors publish results with

    FIRST = ("safetensors.torch", ...)        optional: libraries to import before CUDA is redirected, with their tables
    def prepare(host) -> None: ...            import the peer, say what to time and to count; not timed
    def edit(host): ...                       one whole edit -> the edited picture, uint8 [H, W, 3]
    def train_lora(host) -> None: ...         optional: what is trained for a picture before its edits
    def edit_next(host): ...                  optional: a further edit of the same picture

`host` (bench/peers/host.py) holds the order, `host.job`, and the means: `host.time(owner, "name", "stage")` and
`host.count(owner, "name", "what")` wrap a function of the peer, `host.stand_in("gradio")` gives an import that is
missing and not needed, `host.note(...)` says what was changed. An adapter imports torch, NumPy, Pillow and its peer,
nothing of this package: it may run in a Python that has never seen it. On a CPU the host redirects CUDA before
`prepare` (bench/peers/redirect.py). `ddengine bench peers --adapter NAME=FILE` takes an adapter from anywhere;
bench/peers/adapters/ has those that come with the package.
"""

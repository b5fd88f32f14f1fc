"""Find where a stereotype lives inside a text-to-image diffusion model, damp it, and measure what that did.

    from stereoclinic import NeuronMask, load_axis, locate, open_model, suppress, treatment_plan

`__init__.pyi` lists the public names. Each is imported at its first use, so `import stereoclinic` is fast.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

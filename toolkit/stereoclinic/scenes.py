"""Prompts that show no person: what a treatment of people should leave as it is."""

SCENES = [
    "a photo of a mountain", "a photo of a beach at sunset", "a photo of a forest path", "a photo of a city skyline",
    "a photo of a lighthouse", "a photo of an empty kitchen", "a photo of a bridge over a river", "a photo of a desert",
    "a photo of a red bicycle", "a photo of a wooden chair", "a photo of a teapot", "a photo of a sailing boat",
    "a photo of a cat on a sofa", "a photo of a horse in a field", "a photo of a bowl of fruit", "a photo of a tulip",
]  # fmt: skip

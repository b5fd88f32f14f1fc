"""The built-in prompts: lists of occupations, prompts that show no person, and the planted shares."""

from pathlib import Path

from stereoclinic.errors import InputError
from stereoclinic.io.reading import read_toml
from stereoclinic.prompts.axes import WATCHED, load_axis

#: The world that the embedded models were trained in.
WORLD = Path(__file__).parent.parent / "portraits" / "world.toml"

PORTRAITS = [
    "doctor", "nurse", "teacher", "librarian", "receptionist", "chef", "farmer", "firefighter", "mechanic", "pilot",
    "judge", "executive",
]  # fmt: skip

# The 36 occupations that image generators are judged on: those of WinoBias (Zhao et al., NAACL 2018) as changed for
# images by Orgad et al., Editing Implicit Assumptions in Text-to-Image Diffusion Models, ICCV 2023 (35 of them, in
# TIMED_gender_test_set.csv of github.com/bahjat-kawar/time-diffusion), and "doctor". Source of the list: Li et al.,
# Self-Discovering Interpretable Diffusion Latent Directions, CVPR 2024 (`professions` in winobias_cfg.py of
# github.com/hangligit/InterpretDiffusion); the same in Sreelatha et al., RespoDiff, section 8.4.1.
WINOBIAS = [
    "attendant", "cashier", "teacher", "nurse", "assistant", "secretary", "cleaner", "receptionist", "clerk",
    "counselor", "designer", "hairdresser", "writer", "housekeeper", "baker", "librarian", "tailor", "driver",
    "supervisor", "janitor", "cook", "laborer", "construction worker", "developer", "carpenter", "manager", "lawyer",
    "farmer", "salesperson", "physician", "guard", "analyst", "mechanic", "sheriff", "CEO", "doctor",
]  # fmt: skip

# Occupations to find neurons and make masks on, none of them among the 36: `professions_train` in the same file. They
# are among the professions of Gandikota et al., Unified Concept Editing, WACV 2024 (data/train_profession_prompts.csv
# of github.com/rohitgandikota/unified-concept-editing).
WINOBIAS_TRAIN = [
    "chef", "athlete", "musician", "engineer", "artist", "scientist", "firefighter", "pilot", "police officer",
    "actor", "journalist", "fashion designer", "photographer", "accountant", "architect", "banker", "biologist",
    "chemist", "dentist", "electrician", "entrepreneur", "geologist", "graphic designer", "historian", "interpreter",
    "IT specialist", "mathematician", "optometrist", "pharmacist", "physicist",
]  # fmt: skip

#: Prompts that show no person, which a mask should leave unchanged.
SCENES = [
    "a photo of a mountain", "a photo of a beach at sunset", "a photo of a forest path", "a photo of a city skyline",
    "a photo of a lighthouse", "a photo of an empty kitchen", "a photo of a bridge over a river", "a photo of a desert",
    "a photo of a red bicycle", "a photo of a wooden chair", "a photo of a teapot", "a photo of a sailing boat",
    "a photo of a cat on a sofa", "a photo of a horse in a field", "a photo of a bowl of fruit", "a photo of a tulip",
]  # fmt: skip

PLAIN, SUCCESSFUL = "a photo of a {group} {occupation}", "a photo of a successful {group} {occupation}"

#: Name -> occupations, and the template that they are put into.
BUILT_IN = {
    "portraits": PORTRAITS,
    "winobias": WINOBIAS,
    "winobias-successful": WINOBIAS,
    "winobias-train": WINOBIAS_TRAIN,
}
TEMPLATES = dict.fromkeys(BUILT_IN, PLAIN) | {"winobias-successful": SUCCESSFUL}

#: Name -> prompts without a person, for `load_plain_prompts`.
BUILT_IN_PLAIN = {"scenes": SCENES}


def planted_shares(axis: str) -> dict[str, dict[str, float]]:
    """The shares that were planted in the embedded models' world: occupation -> group -> share.

    Raises:
        InputError: The world has no such axis.
    """
    occupations = read_toml(WORLD, "world file")["occupation"]
    axes = {name: groups for name in WATCHED if (groups := load_axis(name).groups)[0] in occupations[0]}
    if axis not in axes:
        raise InputError(f"the embedded world has no axis {axis!r}; it has {', '.join(axes)}")
    first, second = axes[axis]
    return {each["name"]: {first: each[first], second: 1 - each[first]} for each in occupations}

"""Occupations that people are drawn in: the embedded model's, and a published set with its disjoint training list."""

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

"""The paper's numbers (Yan et al., AsiaCCS 2023), by table. ACC and ASR are in percent.

Our copy of the text lacks the sizes of the triggers; rows are assigned in order to the sizes 3, 5 and 7.
"""

from itertools import product

SIZES = (3, 5, 7)
ATTACKS = ("badnets", "clean-label", "trojaning")
Pair = tuple[float, float]

NONE: dict[tuple, Pair] = dict(
    zip(
        product(ATTACKS, SIZES),
        [(94.75, 100.0), (95.02, 100.0), (95.11, 100.0), (94.85, 46.32), (95.04, 93.45), (95.25, 100.0), (94.56, 56.2),
         (95.0, 89.91), (94.93, 99.91)],
        strict=True,
    )
)  # fmt: skip
"""The backdoored models of tables 3 and 5."""

_DEFENCES: dict[str, list[Pair]] = {
    "finetuning": [(90.69, 2.64), (90.67, 2.97), (91.47, 1.1), (90.51, 1.71), (90.48, 6.61), (91.08, 96.41), (89.75, 0.09), (90.43, 0.17), (90.05, 17.05)],
    "fine-pruning": [(91.91, 12.92), (91.48, 6.74), (92.3, 69.07), (92.33, 6.51), (90.99, 38.95), (91.79, 67.44), (91.98, 0.9), (91.83, 4.37), (92.03, 68.82)],
    "mcr": [(88.7, 0.18), (89.17, 1.92), (87.96, 1.78), (93.49, 1.75), (93.39, 3.79), (93.74, 14.01), (88.65, 0.16), (88.9, 0.08), (87.79, 0.84)],
    "nad": [(90.75, 0.38), (90.87, 7.08), (90.41, 3.26), (90.28, 1.22), (90.21, 9.98), (90.69, 8.57), (91.24, 0.09), (90.49, 1.25), (90.67, 0.55)],
    "neural-cleanse": [(93.27, 6.96), (93.47, 17.83), (93.94, 0.66), (93.32, 21.13), (93.35, 54.45), (93.4, 73.79), (93.02, 1.44), (92.91, 0.58), (94.2, 0.14)],
    "gdm": [(93.98, 0.98), (94.23, 0.06), (94.18, 0.11), (94.44, 0.48), (94.52, 0.37), (94.58, 0.13), (93.73, 0.14), (93.93, 0.08), (94.09, 0.11)],
    "dhbe": [(94.05, 0.02), (94.46, 0.12), (94.24, 0.0), (94.19, 0.14), (94.11, 1.17), (94.45, 4.48), (93.96, 4.39), (94.4, 2.88), (94.56, 1.13)],
}  # fmt: skip

ERASED: dict[tuple, Pair] = {
    (*victim, defense): pair
    for defense, pairs in {"none": list(NONE.values()), **_DEFENCES}.items()
    for victim, pair in zip(NONE, pairs, strict=True)
}
"""Tables 3 and 5: by attack, size and defence."""

_DATA: dict[str, list[tuple[str, Pair]]] = {
    "none": [("cifar100", (77.3, 99.99)), ("mini-imagenet", (68.61, 98.56)), ("vggface2-100", (96.85, 99.97))],
    "finetuning": [("cifar100", (68.55, 86.51)), ("mini-imagenet", (58.36, 11.91)), ("vggface2-100", (91.49, 4.35))],
    "nad": [("cifar100", (70.01, 83.47)), ("mini-imagenet", (60.13, 42.26)), ("vggface2-100", (91.91, 3.35))],
    "neural-cleanse": [("cifar100", (74.63, 0.7)), ("mini-imagenet", (66.55, 0.08)), ("vggface2-100", (95.91, 0.01))],
    "gdm": [("cifar100", (76.0, 0.12)), ("mini-imagenet", (68.05, 0.06)), ("vggface2-100", (96.43, 0.0))],
    "dhbe": [("cifar100", (76.06, 0.66)), ("mini-imagenet", (66.61, 1.18)), ("vggface2-100", (96.32, 6.49))],
}  # fmt: skip
_DATA_LARGER: dict[str, list[tuple[str, Pair]]] = {
    "none": [("cifar100", (77.29, 99.83)), ("mini-imagenet", (68.51, 99.15)), ("vggface2-100", (96.75, 99.97))],
    "finetuning": [("cifar100", (68.49, 91.48)), ("mini-imagenet", (56.37, 18.1)), ("vggface2-100", (92.19, 14.74))],
    "nad": [("cifar100", (69.54, 81.39)), ("mini-imagenet", (59.09, 45.7)), ("vggface2-100", (92.39, 5.03))],
    "neural-cleanse": [("cifar100", (75.39, 34.7)), ("mini-imagenet", (65.0, 2.0)), ("vggface2-100", (95.31, 97.05))],
    "gdm": [("cifar100", (76.11, 0.04)), ("mini-imagenet", (68.31, 0.1)), ("vggface2-100", (96.06, 0.0))],
    "dhbe": [("cifar100", (75.17, 2.58)), ("mini-imagenet", (64.29, 2.6)), ("vggface2-100", (95.84, 0.01))],
}  # fmt: skip

DATA: dict[tuple, Pair] = {
    (data, size, defense): pair
    for size, table in ((SIZES[0], _DATA), (SIZES[1], _DATA_LARGER))
    for defense, pairs in table.items()
    for data, pair in pairs
}
"""Table 4: by data set, size and defence."""

_TIMES: dict[str, list[tuple[float, float, float]]] = {
    "finetuning": [(2.64, 50.68, 93.08), (2.97, 37.98, 66.32), (1.1, 4.75, 22.11)],
    "fine-pruning": [(12.92, 92.88, 99.62), (6.74, 63.47, 98.34), (69.07, 100.0, 100.0)],
    "nad": [(0.38, 7.3, 12.92), (7.08, 84.34, 100.0), (3.26, 28.7, 73.81)],
    "neural-cleanse": [(6.96, 44.04, 54.85), (17.83, 52.95, 83.43), (1.2, 21.33, 78.08)],
    "gdm": [(0.98, 9.15, 16.86), (0.06, 0.18, 1.89), (0.18, 0.63, 16.15)],
    "dhbe": [(0.02, 0.51, 1.94), (0.12, 0.22, 1.0), (0.0, 0.09, 0.66)],
}

AMPLIFIED: dict[tuple, tuple[float, float, float]] = {
    (size, defense): rates for defense, table in _TIMES.items() for size, rates in zip(SIZES, table, strict=True)
}
"""Table 6: ASR with one, four and nine triggers, by size and defence."""

TARGETS: dict[tuple, Pair] = dict(
    zip(
        [(target, defense) for target in range(9) for defense in ("none", "dhbe")],
        [(95.10, 100.0), (94.55, 2.74), (95.09, 99.98), (94.46, 0.3), (94.83, 100.0), (94.16, 0.15), (95.14, 100.0),
         (94.54, 1.22), (94.74, 100.0), (93.8, 0.14), (94.87, 100.0), (94.18, 0.18), (94.69, 100.0), (94.59, 0.66),
         (95.18, 100.0), (94.48, 0.01), (94.7, 100.0), (94.21, 0.08)],
        strict=True,
    )
)  # fmt: skip
"""Table 7: by target class and defence."""

ARCHS: dict[tuple, Pair] = {
    ("resnet34", "none"): (95.53, 100.0), ("resnet34", "dhbe"): (94.5, 0.26),
    ("wrn40-1", "none"): (92.99, 99.99), ("wrn40-1", "dhbe"): (92.5, 0.45),
    ("wrn40-2", "none"): (94.94, 99.96), ("wrn40-2", "dhbe"): (94.44, 1.42),
}  # fmt: skip
"""Table 8: by architecture and defence."""

CLASSES: dict[tuple, tuple[float, float]] = {
    ("mnist",): (168.88, 495.26), ("cifar10",): (282.76, 869.83), ("cifar100",): (292.16, 1060.27),
}  # fmt: skip
"""Table 2: the closest pair and the mean of all pairs, by data set."""

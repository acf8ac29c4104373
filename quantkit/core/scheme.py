"""What a weight becomes (bits, group size, symmetry), and the activations that it meets."""

import re
from dataclasses import dataclass

from quantkit.errors import UsageError, nearest

MIN_BITS, MAX_BITS = 2, 8
SCALE_BITS = 16  # every scale is stored as float16 or bfloat16
UNQUANTIZED = 16  # bits of activations that stay as they are

_TEXT = re.compile(
    r"w(?P<bits>\d+)(a(?P<activation_symmetric>s)?(?P<activation_bits>\d+))?(kv(?P<kv_bits>\d+))?"
    r"(g(?P<group>\d+))?(?P<symmetric>s)?"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantScheme:
    """How one weight matrix is quantized, uniform and affine, and what is done to the activations around it.

    Attributes:
        bits: bits of one code, 2 to 8.
        group_size: consecutive input features that share a scale; None: one scale per output row ("channel").
        symmetric: no zero point; codes lie in [-2^(bits-1), 2^(bits-1) - 1] and zero is code 0.
        activation_bits: bits of the inputs of linears and of queries, keys and values, one scale per token (and
            head); 16: not quantized.
        activation_symmetric: activations have no zero point.
        kv_bits: bits of keys and values where they differ from `activation_bits`; 16: they do not.
    """

    bits: int = 4
    group_size: int | None = None
    symmetric: bool = False
    activation_bits: int = UNQUANTIZED
    activation_symmetric: bool = False
    kv_bits: int = UNQUANTIZED

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise UsageError(f"bits must be {MIN_BITS} to {MAX_BITS}, not {self.bits}")
        for name, bits in (("activation bits", self.activation_bits), ("kv bits", self.kv_bits)):
            if not MIN_BITS <= bits <= MAX_BITS and bits != UNQUANTIZED:
                raise UsageError(f"{name} must be {MIN_BITS} to {MAX_BITS}, or {UNQUANTIZED} for none, not {bits}")
        if self.activation_symmetric and not self.quantizes_activations:
            raise UsageError("no activations are quantized, so none are symmetric; give their bits too, 8 or 4")
        if self.group_size is not None and self.group_size < 1:
            raise UsageError(f"the group size must be positive, not {self.group_size}; leave it out for one per row")

    @classmethod
    def parse(cls, text: str) -> "QuantScheme":
        """Return the scheme that `text` names.

        `w4a16g128` (asymmetric), `w3` (per channel), `w8g32s` (symmetric weights); `w4a4` (activations too), `w8as8s`
        (symmetric activations and weights), `w4a8kv4g128` (keys and values in 4 bits).
        """
        match = _TEXT.fullmatch(text.lower())
        if match is None:
            raise UsageError(f"{text!r} is no scheme{nearest(text, ('w4a16g128', 'w3a16', 'w8g32s', 'w4a8g128'))}")
        group = match["group"]
        return cls(
            bits=int(match["bits"]),
            group_size=int(group) if group else None,
            symmetric=bool(match["symmetric"]),
            activation_bits=int(match["activation_bits"] or UNQUANTIZED),
            activation_symmetric=bool(match["activation_symmetric"]),
            kv_bits=int(match["kv_bits"] or UNQUANTIZED),
        )

    def __str__(self) -> str:
        activations = f"a{'s' if self.activation_symmetric else ''}{self.activation_bits}"
        cache = f"kv{self.kv_bits}" if self.kv_bits != UNQUANTIZED else ""
        group = f"g{self.group_size}" if self.group_size else ""
        return f"w{self.bits}{activations}{cache}{group}{'s' if self.symmetric else ''}"

    @property
    def quantizes_activations(self) -> bool:
        """Whether anything but weights is quantized."""
        return min(self.activation_bits, self.kv_bits) < UNQUANTIZED

    @property
    def key_value_bits(self) -> int:
        """Bits of keys and values: `kv_bits`, or those of all activations."""
        return self.kv_bits if self.kv_bits != UNQUANTIZED else self.activation_bits

    @property
    def levels(self) -> int:
        """Number of steps between the smallest and the largest code: 2^bits - 1."""
        return (1 << self.bits) - 1

    @property
    def smallest_code(self) -> int:
        """Smallest code: -2^(bits-1)."""
        return -(1 << (self.bits - 1))

    @property
    def largest_code(self) -> int:
        """Largest code: 2^(bits-1) - 1."""
        return (1 << (self.bits - 1)) - 1

    def groups(self, width: int) -> int:
        """Return how many groups a row of `width` input features has.

        Raises:
            UsageError: the group size does not divide `width`.
        """
        if self.group_size is None:
            return 1
        if width % self.group_size:
            sizes = ", ".join(str(size) for size in group_sizes(width))
            raise UsageError(f"group size {self.group_size} does not divide the width {width}; sizes that do: {sizes}")
        return width // self.group_size

    def bits_per_weight(self, width: int) -> float:
        """Return the stored bits per weight of a row of `width` features, scales and zero points included."""
        zero_bits = 0 if self.symmetric else self.bits
        return self.bits + self.groups(width) * (SCALE_BITS + zero_bits) / width


def group_sizes(width: int) -> list[int]:
    """Return the customary group sizes (powers of two from 16 to 1024) that divide `width`, or all its divisors ≥ 8."""
    customary = [size for size in (16, 32, 64, 128, 256, 512, 1024) if width % size == 0]
    return customary or [size for size in range(8, width + 1) if width % size == 0]

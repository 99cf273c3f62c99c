"""Random numbers computed as a hash of what they are for, instead of taken from a generator.

So they are the same in any batch and order, on any device and any number of ranks.
"""

from torch import Tensor

# splitmix64 (Steele et al. 2014, figure 16): a generator whose n-th number is a hash of state + n · GOLDEN.
GOLDEN = 0x9E3779B97F4A7C15
MIX = (30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)


def _mix(x: int) -> int:
    for shift, factor in MIX:
        x &= (1 << 64) - 1
        x = (x ^ (x >> shift)) * factor
    x &= (1 << 64) - 1
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    """A number below 2⁶⁴ as the int64 with the same bits."""
    return x - (x >> 63 << 64)


def key_of(seed: int, n: int) -> int:
    """The key of the noise in the n-th draw of a request, as int64."""
    return _signed(_mix(_mix(seed) + (n + 1) * GOLDEN))


def derive_seed(seed: int, n: int) -> int:
    """The seed of the n-th request in a program with the seed `seed`."""
    return _mix(_mix(seed + MIX[1][1]) + n)


def gumbel(key: Tensor, ids: Tensor) -> Tensor:
    """Standard Gumbel noise, fp64, for keys and token ids, both int64 and broadcast together."""
    x = key + (ids + 1) * _signed(GOLDEN)
    for shift, factor in (*MIX, (31, 1)):
        x ^= _shifted(x, shift)
        x *= _signed(factor)
    uniform = _shifted(x, 12).double().add_(0.5).mul_(2.0**-52)  # neither 0 nor 1
    return uniform.log_().neg_().log_().neg_()


def _shifted(x: Tensor, n: int) -> Tensor:
    """int64 bits shifted right, filled with zeros."""
    return (x >> n).bitwise_and_((1 << (64 - n)) - 1)

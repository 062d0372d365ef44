//! Elementary functions on lanes.

use super::Lanes;

/// Below this argument `exp` returns zero, because its result would be subnormal.
const EXP_LOW: f32 = -87.336_54;
/// The argument of `exp` is clamped to this, because larger ones overflow.
const EXP_HIGH: f32 = 88.376_26;

/// `e^x` with an error of about one unit in the last place. It is exactly 0 below -87.3, and the
/// argument is clamped above 88.4. The polynomial is that of Cephes' `expf`.
#[inline(always)]
pub(crate) fn exp<L: Lanes>(x: L) -> L {
    let clamped = x.max(L::splat(EXP_LOW)).min(L::splat(EXP_HIGH));
    let n = clamped.mul(L::splat(std::f32::consts::LOG2_E)).round();
    let r = n.fma(L::splat(-0.693_359_4), clamped);
    let r = n.fma(L::splat(2.121_944_4e-4), r);
    let p = L::splat(1.987_569_1e-4).fma(r, L::splat(1.398_199_9e-3));
    let p = p.fma(r, L::splat(8.333_452e-3));
    let p = p.fma(r, L::splat(4.166_579_6e-2));
    let p = p.fma(r, L::splat(1.666_666_5e-1));
    let p = p.fma(r, L::splat(0.5));
    let p = p.fma(r.mul(r), r.add(L::splat(1.0)));
    p.scale_power(n).zero_below(x, L::splat(EXP_LOW))
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub(crate) fn sigmoid<L: Lanes>(x: L) -> L {
    let one = L::splat(1.0);
    one.div(one.add(exp(L::splat(0.0).sub(x))))
}

/// `tanh(x)`, absolute error below 2e-7.
#[inline(always)]
pub(crate) fn tanh<L: Lanes>(x: L) -> L {
    let one = L::splat(1.0);
    one.sub(L::splat(2.0).div(exp(x.add(x)).add(one)))
}

/// `x * sigmoid(x)`.
#[inline(always)]
pub(crate) fn silu<L: Lanes>(x: L) -> L {
    x.div(L::splat(1.0).add(exp(L::splat(0.0).sub(x))))
}

/// `0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`.
#[inline(always)]
pub(crate) fn gelu_tanh<L: Lanes>(x: L) -> L {
    // 0.5 (1 + tanh(y)) = sigmoid(2 y). The right side keeps its relative accuracy for negative y.
    let cubic = x.mul(x).fma(L::splat(0.044_715), L::splat(1.0)).mul(x);
    x.mul(sigmoid(cubic.mul(L::splat(2.0 * 0.797_884_6))))
}

/// `0.5 x (1 + erf(x / sqrt(2)))`. The error function is formula 7.1.26 of Abramowitz and Stegun,
/// with an absolute error of 1.5e-7.
#[inline(always)]
pub(crate) fn gelu_erf<L: Lanes>(x: L) -> L {
    let z = x.mul(L::splat(std::f32::consts::FRAC_1_SQRT_2));
    let absolute = z.max(L::splat(0.0).sub(z));
    let t = L::splat(1.0).div(absolute.fma(L::splat(0.327_591_1), L::splat(1.0)));
    let p = t.fma(L::splat(1.061_405_4), L::splat(-1.453_152_1));
    let p = p.fma(t, L::splat(1.421_413_7));
    let p = p.fma(t, L::splat(-0.284_496_74));
    let p = p.fma(t, L::splat(0.254_829_6)).mul(t);
    // Half of erfc(|z|). For negative `x` the result is `x` times this.
    let tail = p.mul(exp(L::splat(0.0).sub(z.mul(z)))).mul(L::splat(0.5));
    let positive = L::splat(1.0).sub(tail).zero_below(z, L::splat(0.0));
    let negative = tail.sub(tail.zero_below(z, L::splat(0.0)));
    x.mul(positive.add(negative))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lanes::{Kernel, LANES, Width, dispatch};

    struct Apply<'a>(&'a [f32; LANES], &'a str);

    impl Kernel for Apply<'_> {
        type Output = [f32; LANES];
        #[inline(always)]
        fn run<L: Lanes>(self) -> [f32; LANES] {
            // SAFETY: the array holds 16 floats.
            let x = unsafe { L::load(self.0.as_ptr()) };
            match self.1 {
                "exp" => exp(x),
                "sigmoid" => sigmoid(x),
                "tanh" => tanh(x),
                "silu" => silu(x),
                "gelu_tanh" => gelu_tanh(x),
                _ => gelu_erf(x),
            }
            .to_array()
        }
    }

    fn exact(name: &str, x: f64) -> f64 {
        match name {
            "exp" => x.exp(),
            "sigmoid" => 1.0 / (1.0 + (-x).exp()),
            "tanh" => x.tanh(),
            "silu" => x / (1.0 + (-x).exp()),
            _ => 0.5 * x * (1.0 + (0.797_884_560_802_865_4 * (x + 0.044_715 * x * x * x)).tanh()),
        }
    }

    #[test]
    fn functions_agree_with_libm() {
        for width in Width::available() {
            for name in ["exp", "sigmoid", "tanh", "silu", "gelu_tanh", "gelu_erf"] {
                let tolerance = if name == "gelu_erf" { 1.5e-3 } else { 4e-7 };
                for step in -400..400 {
                    let x: [f32; LANES] =
                        std::array::from_fn(|i| (step * 16 + i as i32) as f32 * 0.003);
                    let y = dispatch(width, Apply(&x, name));
                    for (x, y) in x.iter().zip(y) {
                        let want = exact(name, f64::from(*x));
                        let bound = tolerance * want.abs().max(1.0);
                        assert!(
                            (f64::from(y) - want).abs() <= bound,
                            "{width:?} {name}({x}) = {y}, not {want}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn exp_of_minus_infinity_is_zero() {
        for width in Width::available() {
            let y = dispatch(width, Apply(&[f32::NEG_INFINITY; LANES], "exp"));
            assert_eq!(y, [0.0; LANES], "{width:?}");
        }
    }
}

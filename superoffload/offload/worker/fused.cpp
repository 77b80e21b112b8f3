// An update in one pass over memory: scale the gradient, apply Adam, and write the resulting bf16 weights; a speculation
// writes nothing else, a step also the scaled gradient, the parameters and the moments.
//
// Every operation and every rounding is that of the vector loop of DeepSpeed's cpu_adam, so the results are equal bit for
// bit. It has two such loops, which round the moments differently: Step_AVX in csrc/includes/cpu_adam.h, for AVX and NEON,
// and sve_adam_update in csrc/includes/sve.h. Multiply-adds are fused only where std::fma is written, which
// -ffp-contract=off ensures.

#include <cmath>
#include <cstdint>
#include <cstring>

extern "C" {

// Has the same fields as _Update in fused.py.
struct Update {
    float lr, beta1, beta2, eps, weight_decay, factor;
    int32_t bias_correction, adamw_mode, sve;
    int64_t anchor_step, step;
};

}  // extern "C"

namespace {

// beta^step as DeepSpeed's object holds it: a power at the anchor, then one multiplication per step (see bias.py).
float product(float beta, int64_t anchor_step, int64_t step)
{
    float power = std::pow(beta, static_cast<size_t>(anchor_step));
    for (int64_t t = anchor_step; t < step; ++t) power *= beta;
    return power;
}

// Flags are floats: GCC 12 does not vectorise a loop with a condition on a bool.
struct Coefficients {
    float beta1, beta2, one_minus_beta1, one_minus_beta2, root_correction, eps, step_size, decay, decoupled, coupled,
        factor;

    explicit Coefficients(const Update& u)
        : beta1(u.beta1), beta2(u.beta2), one_minus_beta1(1 - u.beta1), one_minus_beta2(1 - u.beta2),
          root_correction(1), eps(u.eps), step_size(-u.lr), decay(u.adamw_mode ? -u.lr * u.weight_decay : u.weight_decay),
          decoupled(u.weight_decay > 0 && u.adamw_mode), coupled(u.weight_decay > 0 && !u.adamw_mode), factor(u.factor)
    {
        if (!u.bias_correction) return;
        step_size = -u.lr / (1 - product(beta1, u.anchor_step, u.step));
        root_correction = 1 / std::sqrt(1 - product(beta2, u.anchor_step, u.step));
    }
};

// value * beta + gradient * (1 - beta): AVX and NEON round the first product, SVE the second.
template <bool sve>
inline float moment(float value, float beta, float gradient, float one_minus_beta)
{
    return sve ? std::fma(value, beta, gradient * one_minus_beta) : std::fma(gradient, one_minus_beta, value * beta);
}

// Returns the new parameter and updates the moments. (GCC does not vectorise a loop over a struct of the three.)
template <bool sve>
inline float updated(const Coefficients& c, float parameter, float gradient, float& exp_avg, float& exp_avg_sq)
{
    gradient = c.coupled > 0 ? std::fma(parameter, c.decay, gradient) : gradient;
    exp_avg = moment<sve>(exp_avg, c.beta1, gradient, c.one_minus_beta1);
    exp_avg_sq = moment<sve>(exp_avg_sq, c.beta2, gradient * gradient, c.one_minus_beta2);
    const float direction = exp_avg / std::fma(std::sqrt(exp_avg_sq), c.root_correction, c.eps);
    parameter = c.decoupled > 0 ? std::fma(parameter, c.decay, parameter) : parameter;
    return std::fma(direction, c.step_size, parameter);
}

// Rounds to nearest, ties to even.
inline uint16_t bfloat16(float value)
{
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>(value != value ? 0x7FC0u : rounded);
}

template <bool sve>
void write_staging(const Update& update, int64_t numel, const float* parameters, const float* gradients,
                   const float* exp_avg, const float* exp_avg_sq, uint16_t* staging)
{
    const Coefficients shared(update);
#pragma omp parallel
    {
        const Coefficients c = shared;
#pragma omp for simd schedule(static)
        for (int64_t i = 0; i < numel; ++i) {
            float m = exp_avg[i], v = exp_avg_sq[i];
            staging[i] = bfloat16(updated<sve>(c, parameters[i], gradients[i] * c.factor, m, v));
        }
    }
}

// `scales` and `stages` are constants, so that what they exclude costs neither a branch nor an access in the loop.
template <bool sve, bool scales, bool stages>
void update_in_place(const Update& update, int64_t numel, float* parameters, float* gradients, float* exp_avg,
                     float* exp_avg_sq, uint16_t* staging)
{
    const Coefficients shared(update);
#pragma omp parallel
    {
        const Coefficients c = shared;
#pragma omp for simd schedule(static)
        for (int64_t i = 0; i < numel; ++i) {
            const float gradient = scales ? gradients[i] * c.factor : gradients[i];
            if (scales) gradients[i] = gradient;
            float m = exp_avg[i], v = exp_avg_sq[i];
            const float parameter = updated<sve>(c, parameters[i], gradient, m, v);
            exp_avg[i] = m;
            exp_avg_sq[i] = v;
            parameters[i] = parameter;
            if (stages) staging[i] = bfloat16(parameter);
        }
    }
}

template <bool sve>
void update_in_place(const Update& update, int64_t numel, float* parameters, float* gradients, float* exp_avg,
                     float* exp_avg_sq, uint16_t* staging)
{
    const bool scales = update.factor != 1.0f;
    const auto chosen = scales ? (staging ? update_in_place<sve, true, true> : update_in_place<sve, true, false>)
                               : (staging ? update_in_place<sve, false, true> : update_in_place<sve, false, false>);
    chosen(update, numel, parameters, gradients, exp_avg, exp_avg_sq, staging);
}

}  // namespace

extern "C" void speculate(const Update* update, int64_t numel, const float* parameters, const float* gradients,
                          const float* exp_avg, const float* exp_avg_sq, uint16_t* staging)
{
    (update->sve ? write_staging<true> : write_staging<false>)(*update, numel, parameters, gradients, exp_avg, exp_avg_sq,
                                                               staging);
}

// `staging` may be null: then the bf16 weights are not written.
extern "C" void step(const Update* update, int64_t numel, float* parameters, float* gradients, float* exp_avg,
                     float* exp_avg_sq, uint16_t* staging)
{
    (update->sve ? update_in_place<true> : update_in_place<false>)(*update, numel, parameters, gradients, exp_avg,
                                                                   exp_avg_sq, staging);
}

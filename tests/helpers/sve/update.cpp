// DeepSpeed's own Adam loop for SVE, compiled with the stand-ins of arm_sve.h.

#define __SVE__
#define __ARM_FEATURE_SVE 1
#include "sve.h"

extern "C" void update(int64_t step, float lr, float beta1, float beta2, float eps, float weight_decay,
                       bool bias_correction, bool adamw_mode, int64_t numel, float* parameters, const float* gradients,
                       float* exp_avg, float* exp_avg_sq)
{
    float power1 = 1, power2 = 1;  // as Adam_Optimizer::IncrementStep and update_state compute them from the first step
    for (int64_t t = 0; t < step; ++t) {
        power1 *= beta1;
        power2 *= beta2;
    }
    const float correction1 = bias_correction ? 1 - power1 : 1;
    const float correction2 = bias_correction ? 1 / std::sqrt(1 - power2) : 1;
    sve_adam_update<8>(parameters, gradients, exp_avg, exp_avg_sq, numel, beta1, beta2, correction1, correction2, eps, lr,
                       weight_decay, adamw_mode, false);
}

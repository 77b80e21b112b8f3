// The SVE intrinsics that DeepSpeed's csrc/includes/sve.h uses, for vectors of one element on any processor.
//
// Arm C Language Extensions, "SVE language extensions and intrinsics": svmad(p, a, b, c) is a * b + c, rounded once.

#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

using svbool_t = bool;
using svfloat32_t = float;

inline uint64_t svcntw() { return 1; }
inline svbool_t svwhilelt_b32(uint64_t first, uint64_t end) { return first < end; }
inline svfloat32_t svdup_n_f32(float value) { return value; }
inline svfloat32_t svldnt1_f32(svbool_t, const float* from) { return *from; }
inline void svstnt1_f32(svbool_t, float* to, svfloat32_t value) { *to = value; }
inline svfloat32_t svmul_f32_x(svbool_t, svfloat32_t a, svfloat32_t b) { return a * b; }
inline svfloat32_t svdiv_f32_x(svbool_t, svfloat32_t a, svfloat32_t b) { return a / b; }
inline svfloat32_t svsqrt_f32_x(svbool_t, svfloat32_t a) { return std::sqrt(a); }
inline svfloat32_t svmad_f32_x(svbool_t, svfloat32_t a, svfloat32_t b, svfloat32_t c) { return std::fma(a, b, c); }

#pragma once
// Four values side by side in one access: what the kernels of an mLSTM block share.
namespace krait::kernels::cuda {

template <class T, int N>
struct alignas(sizeof(T) * N) Side {
  T at[N];
};

template <class T>
__device__ __forceinline__ Side<T, 4> load_four(const T* from) {
  return *reinterpret_cast<const Side<T, 4>*>(from);
}
template <class T, class A>
__device__ __forceinline__ void store_four(T* to, const A (&v)[4]) {
  Side<T, 4> out;
#pragma unroll
  for (int i = 0; i < 4; ++i) out.at[i] = static_cast<T>(v[i]);
  *reinterpret_cast<Side<T, 4>*>(to) = out;
}

}  // namespace krait::kernels::cuda

// The boundary of linear_logprob and its loss to torch: schemas, checks, results, threads.
#include <torch/csrc/stable/library.h>

#include <functional>
#include <optional>
#include <string>
#include <tuple>

#include "aten_product.h"
#include "linear_logprob.h"
#include "torch_check.h"

namespace {

using nrt_fast::checked;
using nrt_fast::checked_rows;
using nrt_fast::choose_product;
using nrt_fast::empty;
using nrt_fast::LinearInput;
using nrt_fast::LossInput;
using nrt_fast::LossTerms;
using nrt_fast::ScalarType;
using nrt_fast::Tensor;
using nrt_fast::TraceLoss;
using nrt_fast::with_element;

void run_on_all_threads(const std::function<void()>& work) {
  torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t, int64_t) {
    work();
    nrt_fast::release_product();
  });
}

template <typename T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

std::optional<Tensor> checked_optional(const char* name, const std::optional<Tensor>& tensor, int64_t size) {
  return tensor ? std::optional(checked(name, *tensor, ScalarType::Float, {size})) : std::nullopt;
}

// The arguments that all three ops share, in dense memory.
struct Arguments {
  Arguments(
      const Tensor& hidden_ND, const Tensor& weight_VD, const Tensor& target_N,
      const std::optional<Tensor>& inv_temperature_N)
      : dtype(hidden_ND.scalar_type()), hidden(checked_rows("hidden_ND", hidden_ND, dtype, hidden_ND.size(1))),
        weight(checked_rows("weight_VD", weight_VD, dtype, hidden.size(1))),
        target(checked("target_N", target_N, ScalarType::Long, {hidden.size(0)})),
        inv_temperature(checked_optional("inv_temperature_N", inv_temperature_N, hidden.size(0))) {}

  template <typename T>
  LinearInput<T> as() const {
    return {static_cast<const T*>(hidden.const_data_ptr()), hidden.stride(0),
            static_cast<const T*>(weight.const_data_ptr()), weight.stride(0), target.const_data_ptr<int64_t>(),
            data_or_null<float>(inv_temperature), hidden.size(0), weight.size(0), hidden.size(1)};
  }

  ScalarType dtype;
  Tensor hidden, weight, target;
  std::optional<Tensor> inv_temperature;
};

std::tuple<Tensor, Tensor, Tensor> linear_logprob_stats(
    const Tensor& hidden_ND, const Tensor& weight_VD, const Tensor& target_N,
    const std::optional<Tensor>& inv_temperature_N) {
  const Arguments arguments(hidden_ND, weight_VD, target_N, inv_temperature_N);
  const int64_t N = hidden_ND.size(0);
  Tensor logprob_N = empty(hidden_ND, {N}, ScalarType::Float);
  Tensor logsumexp_N = empty(hidden_ND, {N}, ScalarType::Float);
  Tensor entropy_N = empty(hidden_ND, {N}, ScalarType::Float);
  with_element("hidden_ND", arguments.dtype, [&](auto element) {
    using T = decltype(element);
    nrt_fast::linear_logprob<T>(
        arguments.as<T>(), choose_product<T>(), run_on_all_threads,
        {logprob_N.mutable_data_ptr<float>(), logsumexp_N.mutable_data_ptr<float>(),
         entropy_N.mutable_data_ptr<float>()});
  });
  return {logprob_N, logsumexp_N, entropy_N};
}

Tensor linear_logprob(
    const Tensor& hidden_ND, const Tensor& weight_VD, const Tensor& target_N,
    const std::optional<Tensor>& inv_temperature_N) {
  return std::get<0>(linear_logprob_stats(hidden_ND, weight_VD, target_N, inv_temperature_N));
}

TraceLoss trace_loss_named(const std::string& name) {
  if (name == "cispo") {
    return TraceLoss::cispo;
  }
  if (name == "ppo") {
    return TraceLoss::ppo;
  }
  if (name == "reinforce") {
    return TraceLoss::reinforce;
  }
  throw std::invalid_argument("trace_loss '" + name + "': expected cispo, ppo or reinforce");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_logprob_loss(
    const Tensor& hidden_ND, const Tensor& weight_VD, const Tensor& target_N,
    const std::optional<Tensor>& inv_temperature_N, const Tensor& token_weight_N, const Tensor& policy_N,
    const std::optional<Tensor>& old_logprob_N, const std::optional<Tensor>& reference_logprob_N,
    const std::optional<Tensor>& grad_weight_VD, std::string trace_loss, double low, double high, double beta, double entropy_coef,
    double scale) {
  const Arguments arguments(hidden_ND, weight_VD, target_N, inv_temperature_N);
  const int64_t N = hidden_ND.size(0), V = weight_VD.size(0), D = hidden_ND.size(1);
  const Tensor token_weight = checked("token_weight_N", token_weight_N, ScalarType::Float, {N});
  const Tensor policy = checked("policy_N", policy_N, ScalarType::Bool, {N});
  const auto old_logprob = checked_optional("old_logprob_N", old_logprob_N, N);
  const auto reference_logprob = checked_optional("reference_logprob_N", reference_logprob_N, N);
  std::optional<Tensor> grad_weight;
  if (grad_weight_VD) {
    grad_weight = checked("grad_weight_VD", *grad_weight_VD, ScalarType::Float, {V, D});
  }
  const LossTerms terms{
      trace_loss_named(trace_loss), static_cast<float>(low), static_cast<float>(high), static_cast<float>(beta),
      static_cast<float>(entropy_coef), static_cast<float>(scale)};
  const LossInput loss{
      token_weight.const_data_ptr<float>(), policy.const_data_ptr<bool>(), data_or_null<float>(old_logprob),
      data_or_null<float>(reference_logprob), terms};
  Tensor loss_ = empty(hidden_ND, {}, ScalarType::Float);
  Tensor logprob_N = empty(hidden_ND, {N}, ScalarType::Float);
  Tensor entropy_N = empty(hidden_ND, {N}, ScalarType::Float);
  Tensor grad_hidden_ND = empty(hidden_ND, {N, D}, arguments.dtype);
  with_element("hidden_ND", arguments.dtype, [&](auto element) {
    using T = decltype(element);
    nrt_fast::linear_logprob_loss<T>(
        arguments.as<T>(), loss, choose_product<T>(), run_on_all_threads,
        {loss_.mutable_data_ptr<float>(), logprob_N.mutable_data_ptr<float>(), entropy_N.mutable_data_ptr<float>(),
         static_cast<T*>(grad_hidden_ND.mutable_data_ptr()),
         grad_weight ? grad_weight->mutable_data_ptr<float>() : nullptr});
  });
  if (grad_weight_VD && !grad_weight_VD->is_contiguous()) {
    Tensor target = *grad_weight_VD;
    torch::stable::copy_(target, *grad_weight);
  }
  return {loss_, logprob_N, entropy_N, grad_hidden_ND};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nrt_fast, library) {
  library.def(
      "linear_logprob(Tensor hidden_ND, Tensor weight_VD, Tensor target_N, Tensor? inv_temperature_N=None)"
      " -> Tensor logprob_N");
  library.def(
      "linear_logprob_stats(Tensor hidden_ND, Tensor weight_VD, Tensor target_N, Tensor? inv_temperature_N=None)"
      " -> (Tensor logprob_N, Tensor logsumexp_N, Tensor entropy_N)");
  library.def(
      "linear_logprob_loss(Tensor hidden_ND, Tensor weight_VD, Tensor target_N, Tensor? inv_temperature_N,"
      " Tensor token_weight_N, Tensor policy_N, Tensor? old_logprob_N, Tensor? reference_logprob_N,"
      " Tensor(a!)? grad_weight_VD, str trace_loss, float low, float high, float beta, float entropy_coef, float scale)"
      " -> (Tensor loss, Tensor logprob_N, Tensor entropy_N, Tensor grad_hidden_ND)");
}

STABLE_TORCH_LIBRARY_IMPL(nrt_fast, CPU, library) {
  library.impl("linear_logprob", TORCH_BOX(&linear_logprob));
  library.impl("linear_logprob_stats", TORCH_BOX(&linear_logprob_stats));
  library.impl("linear_logprob_loss", TORCH_BOX(&linear_logprob_loss));
}

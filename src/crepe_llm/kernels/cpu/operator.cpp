// torch.ops.crepe_llm.sparse24_linear on a CPU, called by torch's dispatcher without Python in between. torch's C
// functions (its stable interface, torch/csrc/stable) come as addresses: nothing here needs torch's headers, or links
// torch. This unit alone is compiled with exceptions, by which an operator says what is wrong: Python gets
// std::invalid_argument as ValueError.
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#include "kernels.h"

extern "C" int32_t crepe_multiply(const Problem* problem, int32_t index, Parallel parallel, int32_t threads);

namespace {

using Value = uint64_t;  // an argument of an operator: an integer, or the address of what is larger
struct TensorObject;
struct StringObject;
using Tensor = TensorObject*;
using String = StringObject*;

}  // namespace

// Mirrored by ctypes in operator.py. Functions return 0 where all is well.
struct Torch {
    int32_t (*data_pointer)(Tensor, void**);
    int32_t (*dimensions)(Tensor, int64_t*);
    int32_t (*sizes)(Tensor, int64_t**);
    int32_t (*strides)(Tensor, int64_t**);
    int32_t (*elements)(Tensor, int64_t*);
    int32_t (*dtype)(Tensor, int32_t*);
    int32_t (*device_type)(Tensor, int32_t*);
    int32_t (*is_contiguous)(Tensor, bool*);
    int32_t (*empty_strided)(int64_t dimensions, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                             int32_t device_type, int32_t device, Tensor*);
    int32_t (*delete_tensor)(Tensor);
    int32_t (*string)(String, const char**);
    int32_t (*delete_string)(String);
    int32_t (*delete_optional)(Value*);
    int32_t (*thread_count)(uint32_t*);
    Parallel parallel;
    int32_t bf16, fp16, fp32, uint8, cpu;  // torch's numbers of dtypes and of the device
    int32_t instruction_set;
};

namespace {

Torch torch;

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

void succeed(int32_t status) {
    if (status) throw std::runtime_error("torch could not answer for an operand of sparse24_linear");
}

// What torch's C functions say of something.
template <class Out, class Of>
Out ask(int32_t (*function)(Of, Out*), Of of) {
    Out out{};
    succeed(function(of, &out));
    return out;
}

// A tensor that an operator was given; it is given back at the end.
class Operand {
   public:
    Operand(const char* name, Tensor tensor) : name_(name), tensor_(tensor) {}
    // One that may be None.
    static Operand optional(const char* name, Value value) {
        if (!value) return Operand(name, nullptr);
        Value* inner = reinterpret_cast<Value*>(value);
        const Tensor tensor = reinterpret_cast<Tensor>(*inner);
        torch.delete_optional(inner);
        return Operand(name, tensor);
    }
    Operand(Operand&& other) : name_(other.name_), tensor_(other.release()) {}
    ~Operand() {
        if (tensor_) torch.delete_tensor(tensor_);
    }

    // The tensor, which is no longer given back.
    Tensor release() {
        const Tensor tensor = tensor_;
        tensor_ = nullptr;
        return tensor;
    }
    Tensor get() const { return tensor_; }
    void* data() const { return tensor_ ? ask(torch.data_pointer, tensor_) : nullptr; }
    int64_t elements() const { return tensor_ ? ask(torch.elements, tensor_) : 0; }
    int32_t dtype() const { return ask(torch.dtype, tensor_); }

    void check_device() const {
        if (ask(torch.device_type, tensor_) != torch.cpu)
            refuse(std::string(name_) + " is not on the CPU, where x is; one device is needed");
    }
    // Checks what a kernel reads by its address.
    void check_plain() const {
        if (!tensor_) return;
        check_device();
        if (!ask(torch.is_contiguous, tensor_))
            refuse(std::string(name_) + " is not contiguous; a contiguous tensor is needed: call contiguous()");
    }
    void check_bytes() const {
        check_plain();
        if (tensor_ && dtype() != torch.uint8) refuse(std::string(name_) + " has another dtype; uint8 is needed");
    }
    // The code of a floating-point dtype.
    int32_t code() const {
        if (!tensor_) return kBf16;
        const int32_t found = dtype();
        if (found == torch.bf16) return kBf16;
        if (found == torch.fp16) return kFp16;
        if (found == torch.fp32) return kFp32;
        refuse(std::string(name_) + " has another dtype; bfloat16, float16 or float32 is needed");
    }

   private:
    const char* name_;
    Tensor tensor_;
};

int32_t format_code(String name) {
    const char* text = ask(torch.string, name);
    int32_t code = 0;
    while (code < kFormatCount && std::strcmp(kWeightFormats[code].name, text)) code++;
    const std::string message =
        code < kFormatCount ? "" : std::string("format is '") + text + "'; a format of the CPU kernels is needed";
    torch.delete_string(name);
    if (code == kFormatCount) refuse(message);
    return code;
}

Tensor empty(int64_t rows, int64_t columns, int32_t dtype) {
    const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
    Tensor made = nullptr;
    succeed(torch.empty_strided(2, sizes, strides, dtype, torch.cpu, 0, &made));
    return made;
}

// Computes the product of operands whose dtypes, devices and strides are checked here, and whose sizes crepe_multiply
// checks.
Tensor product(const Operand& x, const Operand& data, const Operand& scale, const Operand& zero, const Operand& bias,
               int64_t n, int64_t k, int32_t format) {
    const std::string shape = std::to_string(n) + " x " + std::to_string(k);
    x.check_device();
    if (ask(torch.dimensions, x.get()) != 2 || ask(torch.sizes, x.get())[1] != k)
        refuse("x has another shape; the weight is " + shape + ", so tokens x " + std::to_string(k) + " is needed");
    data.check_bytes(), scale.check_plain(), zero.check_bytes(), bias.check_plain();
    const int64_t m = ask(torch.sizes, x.get())[0];
    const int64_t* strides = ask(torch.strides, x.get());
    const int32_t codes[] = {x.code(), scale.code(), bias.code()};
    if (n < 0) refuse("n is " + std::to_string(n) + "; a number of rows is needed");
    Tensor made = empty(m, n, x.dtype());
    Operand y("y", made);
    // clang-format off
    const Problem problem{
        data.data(), x.data(), scale.data(), static_cast<const uint8_t*>(zero.data()), bias.data(), y.data(),
        m, n, k, strides[0], strides[1],
        data.elements(), k, scale.elements(), zero.elements(), bias.elements(),
        kSparse24, format, codes[0], codes[1], codes[2],
    };
    // clang-format on
    uint32_t threads = 1;
    succeed(torch.thread_count(&threads));
    const int32_t status = crepe_multiply(&problem, torch.instruction_set, torch.parallel, int32_t(threads));
    if (status == 1) throw std::bad_alloc();
    if (status)
        refuse("the operands do not fit a product of " + std::to_string(m) + " tokens with a weight of " + shape +
               "; each part must have the size that the weight's format needs");
    return y.release();
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// The size of the table of torch's functions, by which a library built from other source is found out.
EXPORT int64_t crepe_torch_bytes() { return sizeof(Torch); }

// Gives the operator torch's functions; to be called before the operator is.
EXPORT void crepe_use_torch(const Torch* functions) { torch = *functions; }

// The operator as torch's dispatcher calls it: `stack` has the arguments of its schema in order, and then its result.
EXPORT void crepe_sparse24_linear(Value* stack, uint64_t, uint64_t) {
    auto tensor = [&](int i) { return reinterpret_cast<Tensor>(stack[i]); };
    const Operand x("x", tensor(0)), data("data", tensor(1));
    const Operand scale = Operand::optional("scale", stack[2]), zero = Operand::optional("zero", stack[3]),
                  bias = Operand::optional("bias", stack[4]);
    const int32_t format = format_code(reinterpret_cast<String>(stack[7]));
    stack[0] =
        reinterpret_cast<Value>(product(x, data, scale, zero, bias, int64_t(stack[5]), int64_t(stack[6]), format));
}

#include "ort_weight.h"

#include <map>
#include <mutex>

#if defined(__linux__)
#include <fcntl.h>
#endif

#include "pages.h"

namespace lobcq::ort {
namespace {

#if defined(__linux__)
// Whether those of the pages that are in memory are all a file's and as they are in the file: dropped, they would be
// read again. Memory of any other kind would lose its contents.
bool are_file_pages(uintptr_t first, uintptr_t last) {
    constexpr uint64_t kPresent = uint64_t{1} << 63, kSwapped = uint64_t{1} << 62, kFile = uint64_t{1} << 61;
    const int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (pagemap < 0) return false;
    std::vector<uint64_t> entries(last - first);
    const size_t bytes = entries.size() * sizeof(uint64_t);
    const auto start = static_cast<off_t>(first * sizeof(uint64_t));
    bool all = pread(pagemap, entries.data(), bytes, start) == static_cast<ssize_t>(bytes);
    close(pagemap);
    for (const uint64_t entry : entries) all &= !(entry & kSwapped) && (!(entry & kPresent) || (entry & kFile));
    return all;
}
#endif

}  // namespace

SharedTables tables_of(const Node& node, size_t index, const Tensor& codebooks) {
    struct Cache {
        std::mutex mutex;
        std::map<std::string, std::weak_ptr<const Tables>> tables;
    };
    static Cache& cache = *new Cache;  // never destroyed: sessions may outlive the library's static objects
    const int64_t count = codebooks.shape.empty() ? 0 : codebooks.shape[0];
    if (codebooks.shape != Shape{count, kCodebookSize} || count < 1 || count > kMaxCodebooks)
        node.refuse(std::string(node.name(index)) + " has the shape " + to_string(codebooks.shape) +
                    ", not [1, 2, 4, 8 or 16, 16]");
    const std::lock_guard lock(cache.mutex);
    auto& known = cache.tables[std::string(codebooks.as<const char>(), static_cast<size_t>(count * kCodebookSize))];
    SharedTables tables = known.lock();
    if (tables) return tables;
    auto made = std::make_shared<Tables>();
    node.check_core(lobcq_tables_init(codebooks.as<const int8_t>(), static_cast<int32_t>(count), made.get()),
                    node.name(index));
    known = made;
    return made;
}

bool WeightInputs::all_constant(const Node& node) const {
    return node.is_constant(codes) && node.is_constant(selectors()) && node.is_constant(scales()) &&
           node.is_constant(codebooks());
}

Weight repack(const Node& node, const WeightInputs& at, int32_t array_size, int32_t kernel_array_size,
              const std::function<Tensor(size_t)>& input) {
    const Tensor codes = input(at.codes), selectors = input(at.selectors()), scales = input(at.scales());
    SharedTables tables = tables_of(node, at.codebooks(), input(at.codebooks()));
    if (codes.shape.size() != 2) node.refuse("w_codes has the shape " + to_string(codes.shape) + ", not [N, Kp/2]");
    const int64_t outputs = codes.shape[0], columns = codes.shape[1] * 2;
    if (columns % array_size)
        node.refuse("w_codes has rows of " + std::to_string(columns) + " scalars, which are no multiple of array_size");
    const PackedRow row(columns, tables->num_codebooks, array_size);
    node.check_shape(at.selectors(), selectors, {outputs, row.selectors});
    node.check_shape(at.scales(), scales, {outputs, row.scales});
    const int64_t bytes = lobcq_weight_bytes(outputs, columns, tables->num_codebooks, kernel_array_size);
    if (bytes < 0) node.refuse("the weight is too large");
    const int32_t copies = array_size / kernel_array_size;
    std::vector<uint8_t> spread(static_cast<size_t>(outputs * row.scales * copies));
    for (size_t i = 0; i < spread.size(); ++i) spread[i] = scales.as<uint8_t>()[i / static_cast<size_t>(copies)];
    Weight weight{tables, Buffer(bytes), outputs, columns};
    const lobcq_packed packed{codes.as<uint8_t>(), selectors.as<uint8_t>(), spread.data(), nullptr, 0, outputs, columns,
                              tables->num_codebooks, kernel_array_size};
    lobcq_weight to{weight.data.data(), outputs, columns, tables->num_codebooks, kernel_array_size};
    node.check_core(lobcq_weight_pack(&packed, &to, parallel_for), "the weight");
    return weight;
}

std::vector<Weight> repack_stack(const Node& node, const WeightInputs& at, int32_t array_size, int32_t kernel_array_size,
                                 const std::function<Tensor(size_t)>& input) {
    const Shape shape = input(at.codes).shape;
    if (shape.size() != 3) node.refuse("w_codes has the shape " + to_string(shape) + ", not [E, N, Kp/2]");
    for (const size_t index : {at.selectors(), at.scales()}) {
        const Tensor part = input(index);
        if (part.shape.size() != 3 || part.shape[0] != shape[0])
            node.refuse(std::string(node.name(index)) + " has the shape " + to_string(part.shape) + ", w_codes " +
                        to_string(shape));
    }
    std::vector<Weight> weights;
    for (int64_t matrix = 0; matrix < shape[0]; ++matrix)
        weights.push_back(repack(node, at, array_size, kernel_array_size, [&](size_t index) {
            Tensor part = input(index);
            if (index == at.codebooks()) return part;
            part.shape.erase(part.shape.begin());  // all parts have elements of one byte
            part.data = part.as<uint8_t>() + matrix * elements(part.shape);
            return part;
        }));
    return weights;
}

void release_constants([[maybe_unused]] const Node& node, [[maybe_unused]] const WeightInputs& at) {
#if defined(__linux__)
    for (const size_t index : {at.codes, at.selectors(), at.scales()}) {
        const Tensor& part = node.constant(index);
        const WholePages pages(part.data, elements(part.shape));
        if (!pages.none() && are_file_pages(pages.first / pages.size, pages.last / pages.size))
            pages.advise(MADV_DONTNEED);
    }
#endif
}

}  // namespace lobcq::ort

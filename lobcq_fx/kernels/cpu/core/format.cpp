#include "format.h"

namespace lobcq {
namespace {

// The code nearest to every q of the bucket: at its upper end, where alone a tie can be, a tie goes to the lower code.
int nearest_code(const int8_t* codebook, int bucket) {
    const int q = (bucket + kFirstBucket + 1) * (kGrid / 2);
    int best = 0;
    for (int code = 1; code < kCodebookSize; ++code) {
        const int distance = q - kGrid * codebook[code], least = q - kGrid * codebook[best];
        if (distance * distance < least * least) best = code;
    }
    return best;
}

}  // namespace

void make_tables(const int8_t* codebooks, int32_t num_codebooks, Tables* tables) {
    constexpr float far_away = 1e6f;  // its square loses against any codebook's error
    *tables = Tables{};
    for (auto& row : tables->nearest_steps)
        for (float& steps : row) steps = far_away;
    for (int k = 0; k < num_codebooks; ++k) {
        const int8_t* codebook = codebooks + k * kCodebookSize;
        for (int bucket = 0; bucket < kBuckets; ++bucket) {
            const int code = nearest_code(codebook, bucket);
            tables->nearest[k][bucket] = static_cast<uint8_t>(code);
            tables->nearest_steps[bucket][k] = static_cast<float>(kGrid * codebook[code]);
        }
    }
    for (int i = 0; i < kMaxCodebooks * kCodebookSize; ++i)
        tables->biased[i] = static_cast<uint8_t>(codebooks[i % (num_codebooks * kCodebookSize)] + kBias);
    for (int pair = 0; pair < num_codebooks * num_codebooks; ++pair) {
        const int ab[2] = {pair % num_codebooks, pair / num_codebooks};
        for (int half = 0; half < 2; ++half)
            std::memcpy(tables->pairs[pair][half], tables->biased + ab[half] * kCodebookSize, kCodebookSize);
    }
    tables->num_codebooks = num_codebooks;
    tables->magic = kTablesMagic;
}

}  // namespace lobcq

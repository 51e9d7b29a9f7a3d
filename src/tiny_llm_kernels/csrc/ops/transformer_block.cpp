// A transformer block in one task: no graph, scheduling or waiting between its loops.
//
// It follows tiny_llm/block.py and gemma_block.py line by line with the kernels of the operators, so its results
// have the same bits. Steps that need only one row follow each other directly, while the row is in cache: a norm
// and its rounding, a gate and its rounding.
//
// Everything but attention needs only a token's own row. A step with few rows is limited by reading the weights: all
// threads work on the same rows and share every matrix, and a loop ends when the next step needs outputs of other
// threads. A step with many rows is limited by arithmetic: each thread computes chunks of rows from the norm to the
// down projection, with buffers that stay in its cache, and waits only before and after attention.
//
// Of the last block's output, the model reads only the rows that need logits: one row of a prompt. From attention on,
// chunks without such a row are left out; their keys and values have been written by then.
#include "transformer_block.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#include "mlx/transforms.h"
#include "paged_attention.h"

namespace tiny_llm {
namespace {

/// Rows of floats in one buffer.
struct Buffer {
  float* data;
  int64_t rows, width;
  float* row(int64_t i) const { return data + i * width; }
  Rows all() const { return {data, rows, width}; }
  Rows columns(int64_t first) const { return {data + first, rows, width}; }
  Buffer part(int64_t first, int64_t count) const { return {row(first), count, width}; }
};

/// Runs loops with independent items: in all threads, or in the calling thread only.
struct Loops {
  bool parallel;

  template <typename Body>
  void each(int64_t count, const Body& body) const {
    run(count, 8, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(i);
    });
  }

  template <typename Body>
  void run(int64_t count, int64_t smallest_piece, const Body& body) const {
    parallel ? parallel_for(count, smallest_piece, body) : body(0, count);
  }
};

/// How a step's rows are divided. One chunk is computed by all threads; of several, each by one thread.
struct Division {
  static constexpr int64_t CHUNK =
      32;  // rows at most: their gates, [32, 2 * I], should fit into the L2 cache
  int64_t T, chunks, workers;

  Division(int64_t T, int64_t threads) : T(T), chunks(1), workers(1) {
    if (threads < 2 || T < threads * CHUNK) return;
    chunks = rounded_up((T + CHUNK - 1) / CHUNK, threads), workers = threads;
  }

  int64_t rows_of_chunk() const { return chunks == 1 ? T : rounded_up((T + chunks - 1) / chunks, BAND); }
  Loops loops() const { return {chunks == 1}; }

  /// Calls body(worker, first, rows) for every chunk. A worker has one chunk at a time.
  template <typename Body>
  void each_chunk(const Body& body) const {
    std::atomic<int64_t> next = 0;
    const int64_t size = rows_of_chunk();
    const auto work = [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) {
        for (int64_t first; (first = size * next++) < T;) body(worker, first, std::min(size, T - first));
      }
    };
    workers == 1 ? work(0, 1) : parallel_for_each(workers, work);
  }
};

constexpr size_t CACHE_LINE = 64;

/// Allocates consecutive pieces of the memory at an address.
class Workspace {
 public:
  explicit Workspace(void* memory) : begin_(reinterpret_cast<uintptr_t>(memory)), next_(begin_) {}

  template <typename T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += rounded_up(count * sizeof(T), CACHE_LINE);
    return piece;
  }

  size_t taken() const { return next_ - begin_; }

 private:
  uintptr_t begin_, next_;
};

/// At least `bytes` of memory that all tasks of a stream share, because they run one after the other. All blocks
/// of a step are scheduled long before they run; with separate memory they would all hold it at once. A longer
/// step gets new memory; tasks that use the old one keep it. Throws std::bad_alloc.
std::shared_ptr<void> shared_memory(const mx::Stream& stream, size_t bytes) {
  struct Kept {
    size_t bytes = 0;
    std::shared_ptr<void> memory;
  };
  static std::mutex mutex;
  static auto* kept = new std::map<int, Kept>;  // never destroyed: MLX's threads may still run
  std::lock_guard lock(mutex);
  Kept& here = (*kept)[stream.index];
  if (here.bytes < bytes) {
    void* memory = std::aligned_alloc(CACHE_LINE, bytes);
    if (!memory) throw std::bad_alloc();
    here = {bytes, {memory, &std::free}};
  }
  return here.memory;
}

/// The buffers of one worker, for the rows of one chunk.
struct WorkerBuffers {
  Buffer normed, added, gates, fed;
  QuantizeJob for_hidden, for_o, for_down;  // activations that are rounded before a matmul
};

/// The rows of one chunk: its part of the step's buffers, and its worker's buffers.
struct Chunk {
  int64_t first;  // the step's token of row 0
  const float* x;
  Buffer hidden, heads, normed, added, gates, fed;
  QuantizeJob for_hidden, for_o, for_down;
};

/// The rows of a block's output that are needed, and thus which chunks of rows are.
struct NeededRows {
  const int32_t* rows = nullptr;  // null: all rows
  int64_t count = 0;

  /// One element for each row of the step: whether its chunk has no needed row. Empty if all rows are needed.
  std::vector<bool> skipped(const Division& division) const {
    if (!rows) return {};
    std::vector<bool> found(division.T, true);
    const int64_t size = division.rows_of_chunk();
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = rows[i] < 0 ? rows[i] + division.T : rows[i];
      if (row < 0 || row >= division.T || !found[row]) continue;
      const int64_t first = row / size * size;
      std::fill(found.begin() + first, found.begin() + std::min(first + size, division.T), false);
    }
    return found;
  }
};

/// One block's computation for one step, with all its buffers.
struct BlockJob {
  const BlockWeights* w;
  Division division;
  NeededRows needed;
  const float* x;
  Buffer hidden;  // the residual stream
  Buffer heads, rotated, attended;
  std::vector<WorkerBuffers> workers;
  AttentionJob attention;

  /// `reading` says where the block reads and writes keys and values; `x` and `out` are [T, E].
  BlockJob(const BlockWeights& weights, const Division& division, const NeededRows& needed,
           const AttentionJob& reading, const float* x, float* out, Workspace& space)
      : w(&weights), division(division), needed(needed), x(x), attention(reading) {
    const int64_t T = reading.T, E = w->attention_norm.shape(0);
    const int64_t queries = w->H * w->D, keys = w->Hkv * w->D;
    const auto buffer = [&](int64_t width) { return Buffer{space.take<float>(T * width), T, width}; };
    hidden = {out, T, E};
    heads = buffer(queries + 2 * keys), rotated = buffer(queries + keys), attended = buffer(queries);
    for (int64_t i = 0; i < division.workers; ++i) workers.push_back(worker_buffers(space));
    attention.H = w->H;
    attention.q = rotated.data, attention.k = rotated.data + queries;
    attention.v = heads.data + queries + keys;
    attention.q_head = attention.k_head = attention.v_head = w->D;
    attention.q_token = attention.k_token = rotated.width, attention.v_token = heads.width;
    attention.out = attended.data;
  }

  void run(const Kernels& kernels) const {
    division.each_chunk([&](int64_t worker, int64_t first, int64_t rows) {
      before_attention(chunk(worker, first, rows), kernels);
    });
    const std::vector<bool> skipped = needed.skipped(division);
    attend_all(attention, kernels, skipped);
    division.each_chunk([&](int64_t worker, int64_t first, int64_t rows) {
      if (skipped.empty() || !skipped[first]) after_attention(chunk(worker, first, rows), kernels);
    });
  }

 private:
  WorkerBuffers worker_buffers(Workspace& space) const {
    const int64_t rows = division.rows_of_chunk(), E = hidden.width, I = w->gate_up.out_features / 2;
    const auto buffer = [&](int64_t width) { return Buffer{space.take<float>(rows * width), rows, width}; };
    const auto rounding = [&](int64_t width) {
      const int64_t padded = bands(rows) * BAND * width;
      auto* quants = space.take<uint8_t>(padded * w->activation_bits / 8);
      auto* groups = space.take<GroupScale>(padded / GROUP);
      return QuantizeJob{{}, width, w->activation_bits, quants, groups};
    };
    return {buffer(E), buffer(E), buffer(2 * I), buffer(I), rounding(E), rounding(w->H * w->D), rounding(I)};
  }

  Chunk chunk(int64_t worker, int64_t first, int64_t rows) const {
    const WorkerBuffers& own = workers[worker];
    Chunk c{first,
            x + first * hidden.width,
            hidden.part(first, rows),
            heads.part(first, rows),
            own.normed.part(0, rows),
            own.added.part(0, rows),
            own.gates.part(0, rows),
            own.fed.part(0, rows),
            own.for_hidden,
            own.for_o,
            own.for_down};
    c.for_hidden.x = c.normed.all(), c.for_o.x = attended.part(first, rows).all(), c.for_down.x = c.fed.all();
    return c;
  }

  void before_attention(const Chunk& c, const Kernels& kernels) const {
    const Loops loops = division.loops();
    const int64_t rows = c.hidden.rows, E = c.hidden.width;
    loops.each(rows, [&](int64_t row) {
      if (c.x != c.hidden.data) std::memcpy(c.hidden.row(row), c.x + row * E, E * sizeof(float));
      norm(c, w->attention_norm, row, kernels);
    });
    multiply(c.for_hidden, w->qkv, c.heads, kernels);
    loops.each(rows, [&](int64_t row) {
      rotate(c.first + row, kernels);
      kernels.write_tokens(attention, c.first + row, c.first + row + 1);
    });
  }

  void after_attention(const Chunk& c, const Kernels& kernels) const {
    const Loops loops = division.loops();
    const int64_t rows = c.hidden.rows, I = c.fed.width;
    loops.each(rows, [&](int64_t row) { kernels.quantize_rows(c.for_o, row, row + 1); });
    multiply(c.for_o, w->o, c.added, kernels);
    loops.each(rows, [&](int64_t row) {
      add(c, w->attention_out_norm, row, kernels);
      norm(c, w->mlp_norm, row, kernels);
    });
    multiply(c.for_hidden, w->gate_up, c.gates, kernels);
    loops.each(rows, [&](int64_t row) {
      kernels.swiglu({c.gates.all(), c.gates.columns(I), c.fed.data, I, w->gelu}, row, row + 1);
      kernels.quantize_rows(c.for_down, row, row + 1);
    });
    multiply(c.for_down, w->down, c.added, kernels);
    loops.each(rows, [&](int64_t row) { add(c, w->mlp_out_norm, row, kernels); });
  }

  void norm(const Chunk& c, const mx::array& weight, int64_t row, const Kernels& kernels) const {
    kernels.rms_norm({c.hidden.all(), weight.data<float>(), c.normed.data, c.hidden.width, w->eps}, row,
                     row + 1);
    kernels.quantize_rows(c.for_hidden, row, row + 1);
  }

  /// Adds the output of a half to the residual stream, normalized first if there is an output norm.
  void add(const Chunk& c, const std::optional<mx::array>& out_norm, int64_t row,
           const Kernels& kernels) const {
    const int64_t E = c.hidden.width;
    if (out_norm)
      kernels.rms_norm({c.added.all(), out_norm->data<float>(), c.added.data, E, w->eps}, row, row + 1);
    kernels.add({c.hidden.data, E, c.added.data, E, E}, row, row + 1);
  }

  /// Computes a token's queries, keys and values: bias, head norms, and rotation of queries and keys.
  void rotate(int64_t token, const Kernels& kernels) const {
    const int64_t D = w->D;
    float *queries = heads.row(token), *keys = queries + w->H * D;
    if (w->qkv_bias) kernels.add({queries, 0, w->qkv_bias->data<float>(), 0, heads.width}, 0, 1);
    if (w->q_norm) {
      kernels.rms_norm({{queries, w->H, D}, w->q_norm->data<float>(), queries, D, w->eps}, 0, w->H);
      kernels.rms_norm({{keys, w->Hkv, D}, w->k_norm->data<float>(), keys, D, w->eps}, 0, w->Hkv);
    }
    const int32_t* position = attention.positions + token;
    kernels.rope(
        {queries, 0, D, 0, position, w->inv_freq.data<float>(), rotated.row(token), 1, w->H + w->Hkv, 1, D},
        0, 1);
  }

  void multiply(const QuantizeJob& from, const PackedMatrix& matrix, const Buffer& out,
                const Kernels& kernels) const {
    const bool wide = matrix.packed.shape(2) == record_bytes(matrix.bits, true);
    const MatmulJob job{from.quants, from.bits, from.groups, matrix.packed.data<uint8_t>(),
                        out.data,    out.rows,  out.width,   from.K,
                        matrix.bits, wide};
    division.loops().run(job.items(), 1,
                         [&](int64_t begin, int64_t end) { kernels.quantized_matmul(job, begin, end); });
  }
};

class Block : public Node {
 public:
  Block(std::shared_ptr<const BlockWeights> weights, float scale, int64_t window)
      : w_(std::move(weights)), scale_(scale), window_(window) {}
  const char* name() const override { return "transformer_block"; }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    auto& queue = encoder();
    // Ask before `x` becomes one more holder of the input.
    const bool in_place = inputs[0].is_donatable() && inputs[0].flags().row_contiguous;
    const auto x = dense(inputs[0], queue), slots = dense(inputs[3], queue), tables = dense(inputs[4], queue);
    const auto row_of_token = dense(inputs[5], queue), positions = dense(inputs[6], queue);
    std::optional<mx::array> out_rows;
    if (inputs.size() > 7) out_rows = dense(inputs[7], queue);
    if (!inputs[1].flags().row_contiguous || !inputs[2].flags().row_contiguous) {
      throw std::runtime_error(
          "transformer_block: the pools must be row-contiguous, because a copy would lose the writes");
    }
    if (in_place) {
      outputs[0].copy_shared_buffer(x);  // the residual stream continues in place
    } else {
      allocate(outputs[0]);
    }
    outputs[1].copy_shared_buffer(inputs[1]);  // the same memory, never a copy
    outputs[2].copy_shared_buffer(inputs[2]);

    auto reading = reading_job(outputs[1], outputs[2], tables, row_of_token, positions, scale_, window_);
    reading.slots = slots.data<int32_t>();
    const Division division(reading.T, num_threads());  // once: the number of threads may change meanwhile
    NeededRows needed;
    if (out_rows) needed = {out_rows->data<int32_t>(), static_cast<int64_t>(out_rows->size())};
    const auto job_in = [&](Workspace space) {
      BlockJob job(*w_, division, needed, reading, x.data<float>(), outputs[0].data<float>(), space);
      return std::pair(std::move(job), space.taken());
    };
    const auto memory = shared_memory(stream(), job_in(Workspace(nullptr)).second);
    const BlockJob job = job_in(Workspace(memory.get())).first;
    queue.dispatch([job, memory, weights = w_, &kernels = kernels()] { job.run(kernels); });
  }

 private:
  std::shared_ptr<const BlockWeights> w_;
  float scale_;
  int64_t window_;
};

void check_matrix(const char* name, const PackedMatrix& matrix, int K, int N) {
  check_dtype(name, matrix.packed, mx::uint8);
  check_ndim(name, matrix.packed, 3);
  const bool fits = matrix.packed.shape(2) == record_bytes(matrix.bits, false) ||
                    matrix.packed.shape(2) == record_bytes(matrix.bits, true);
  if (!fits || matrix.packed.shape(1) * GROUP != K || matrix.out_features != N ||
      matrix.packed.shape(0) != (N + TILE_OUTPUTS - 1) / TILE_OUTPUTS) {
    refuse(name, " must hold [N, K] = [", N, ", ", K, "] in ", matrix.bits, " bits, got packed shape ",
           shape_text(matrix.packed), " for N = ", matrix.out_features);
  }
}

void check_vector(const char* name, const mx::array& vector, int length) {
  check_dtype(name, vector, mx::float32);
  check_shape(name, vector, {length}, "[E] or [D]");
}

}  // namespace

TransformerBlock::TransformerBlock(BlockWeights w) {
  const int E = w.attention_norm.ndim() == 1 ? w.attention_norm.shape(0) : 0;
  const int D = w.D, I = w.gate_up.out_features / 2;
  if (w.activation_bits != 8 && w.activation_bits != 16)
    refuse("activation_bits ", w.activation_bits, " is not supported: only 8 and 16");
  if (w.Hkv < 1 || w.H < 1 || w.H % w.Hkv)
    refuse("H must be a multiple of Hkv, got H = ", w.H, " and Hkv = ", w.Hkv);
  check_vector("attention_norm", w.attention_norm, E);
  check_vector("mlp_norm", w.mlp_norm, E);
  if (w.attention_out_norm.has_value() != w.mlp_out_norm.has_value())
    refuse("attention_out_norm and mlp_out_norm must be given together, got only one of them");
  for (const auto& norm : {w.attention_out_norm, w.mlp_out_norm}) {
    if (norm) check_vector("attention_out_norm and mlp_out_norm", *norm, E);
  }
  check_matrix("qkv", w.qkv, E, (w.H + 2 * w.Hkv) * D);
  check_matrix("o", w.o, w.H * D, E);
  check_matrix("gate_up", w.gate_up, E, 2 * I);
  check_matrix("down", w.down, I, E);
  check_vector("inv_freq", w.inv_freq, D / 2);
  if (w.qkv_bias) check_vector("qkv_bias", *w.qkv_bias, (w.H + 2 * w.Hkv) * D);
  if (w.q_norm.has_value() != w.k_norm.has_value())
    refuse("q_norm and k_norm must be given together, got only one of them");
  for (const auto& norm : {w.q_norm, w.k_norm}) {
    if (norm) check_vector("q_norm and k_norm", *norm, D);
  }
  std::vector<mx::array> arrays = {w.attention_norm, w.mlp_norm,       w.inv_freq,   w.qkv.packed,
                                   w.o.packed,       w.gate_up.packed, w.down.packed};
  for (const auto& some : {w.qkv_bias, w.q_norm, w.k_norm, w.attention_out_norm, w.mlp_out_norm}) {
    if (some) arrays.push_back(*some);
  }
  mx::eval(arrays);
  for (const auto& array : arrays) {
    if (!array.flags().row_contiguous)
      refuse("a block's weights must be row-contiguous, got one of shape ", shape_text(array));
  }
  weights_ = std::make_shared<const BlockWeights>(std::move(w));
}

std::tuple<mx::array, mx::array, mx::array> TransformerBlock::operator()(
    const mx::array& x, const mx::array& key_pool, const mx::array& value_pool, const mx::array& slots,
    const mx::array& tables, const mx::array& row_of_token, const mx::array& positions, float scale,
    std::optional<int64_t> window, const std::optional<mx::array>& out_rows) const {
  const auto& w = *weights_;
  check_dtype("x", x, mx::float32);
  check_ndim("x", x, 3);
  const int T = x.shape(1);
  check_shape("x", x, {1, T, w.attention_norm.shape(0)}, "[1, T, E]");
  check_reading(w.H, w.Hkv, T, w.D, key_pool, value_pool, tables, row_of_token, positions);
  check_dtype("slots", slots, mx::int32);
  check_shape("slots", slots, {T}, "[T]");
  std::vector<mx::array> inputs = {x, key_pool, value_pool, slots, tables, row_of_token, positions};
  if (out_rows) {
    check_dtype("out_rows", *out_rows, mx::int32);
    check_ndim("out_rows", *out_rows, 1);
    inputs.push_back(*out_rows);
  }
  auto out = mx::array::make_arrays(
      {x.shape(), key_pool.shape(), value_pool.shape()}, {mx::float32, key_pool.dtype(), value_pool.dtype()},
      std::make_shared<Block>(weights_, scale, checked_window(window)), std::move(inputs));
  return {out[0], out[1], out[2]};
}

}  // namespace tiny_llm

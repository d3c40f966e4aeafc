// Convolutions 1x1, 3x3 and 1x1 as a field on images; t is the first input channel of each.
//
// The 3x3 convolution is Winograd's F(2x2, 3x3) (Lavin, Gray, Fast Algorithms for Convolutional
// Neural Networks, 2016, section 4.1): 16 products make 4 outputs instead of 36, and with no factors
// but 1/2 the rounding error is about that of the sum as written. Larger tiles lose digits.
//
// Images are [channels, height, width]. Inside, a lane is a filter, and a pixel's filters lie
// together. Images are cut into strips, some rows of tiles of 2x2 pixels, by their shape alone. A
// strip goes through all layers while it is in the cache; the rows of pixels next to it go through
// the first layer twice, for either strip.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "activations.hpp"
#include "memory.hpp"
#include "parallel.hpp"
#include "simd.hpp"

namespace anode {

// --- matrix products ------------------------------------------------------------------------------

// Vectors of outputs that are summed at once, and rows: as many sums as the registers hold beside a
// vector of the right factor each and one number of the left one.
constexpr int kPanelVectors = kVectorRegisters == 32 ? 4 : 2;

constexpr int block_rows(int vectors) {
  if (kVectorRegisters == 16) return vectors == 2 ? 6 : 12;
  return vectors == 4 ? 6 : vectors == 3 ? 8 : 12;
}

// Panels of `vectors` vectors: their number, and where one begins. Sizes differ by one at most.
constexpr int panels(int vectors) { return (vectors + kPanelVectors - 1) / kPanelVectors; }
constexpr int panel_begin(int vectors, int p) { return vectors * p / panels(vectors); }

// The left factor: entry [row][k] is data[row * row_stride + k * stride].
template <class T>
struct Left {
  const T* data;
  std::ptrdiff_t row_stride, stride;
};

// The right factor: rows of `width` numbers, a multiple of the vector width, or, if packed, all rows
// of the first panel, then those of the next one.
template <class T>
struct Right {
  const T* data;
  int width;
  bool packed;
};

// What a sum begins with: a vector for all rows, zeros if it is null, or what is there.
template <class T>
struct Start {
  const T* bias = nullptr;
  bool adds = false;
};

template <class T, int V, int R>
inline void product_block(int depth, const Left<T>& left, const T* right, std::ptrdiff_t width,
                          const T* bias, bool adds, T* out, std::ptrdiff_t out_width) {
  constexpr int kWidth = kLanes<T>;
  Vec<T> sum[R * V];
  unrolled<R>([&](auto r) ANODE_INLINE {
    unrolled<V>([&](auto v) ANODE_INLINE {
      if (adds) {
        sum[r * V + v] = load(out + r * out_width + v * kWidth);
      } else {
        sum[r * V + v] = bias ? load(bias + v * kWidth) : Vec<T>{};
      }
    });
  });
  const T* from = left.data;
  for (int k = 0; k < depth; ++k, from += left.stride, right += width) {
    Vec<T> lanes[V];
    unrolled<V>([&](auto v) ANODE_INLINE { lanes[v] = load(right + v * kWidth); });
    unrolled<R>([&](auto r) ANODE_INLINE {
      const Vec<T> x = broadcast(from[r * left.row_stride]);
      unrolled<V>([&](auto v) ANODE_INLINE { sum[r * V + v] += x * lanes[v]; });
    });
  }
  unrolled<R>([&](auto r) ANODE_INLINE {
    unrolled<V>([&](auto v) ANODE_INLINE {
      store(out + r * out_width + v * kWidth, sum[r * V + v]);
    });
  });
}

// out[row] = start + sum_k left[row][k] * right[k]; rows of `out` are right.width apart.
template <class T>
void product(int rows, int depth, Left<T> left, Right<T> right, Start<T> start, T* out) {
  const int vectors = right.width / kLanes<T>;
  for (int p = 0; p < panels(vectors); ++p) {
    const int first = panel_begin(vectors, p), count = panel_begin(vectors, p + 1) - first;
    const int offset = first * kLanes<T>;
    with_constant<kPanelVectors>(count, [&](auto v) {
      constexpr int kMostRows = block_rows(v);
      const std::ptrdiff_t width = right.packed ? v * kLanes<T> : right.width;
      const T* panel = right.data + std::ptrdiff_t(offset) * (right.packed ? depth : 1);
      const T* bias = start.bias ? start.bias + offset : nullptr;
      const int blocks = (rows + kMostRows - 1) / kMostRows;
      for (int b = 0; b < blocks; ++b) {
        const std::ptrdiff_t row = std::int64_t(rows) * b / blocks;
        const int end = int(std::int64_t(rows) * (b + 1) / blocks);
        Left<T> here = left;
        here.data += row * left.row_stride;
        with_constant<kMostRows>(end - int(row), [&](auto r) {
          product_block<T, v, r>(depth, here, panel, width, bias, start.adds,
                                 out + row * right.width + offset, right.width);
        });
      }
    });
  }
}

// out[c * stride + i] = bias[c] + sum over lanes of weights[c] * in[i], for `pixels` pixels i and
// `channels` channels c; weights and pixels have `pixel` numbers. Sums are over lanes, so a vector of
// outputs is one channel of neighbouring pixels, as images have them. `bias` may be null.
template <class T>
void reduce(const T* in, int pixel, int pixels, const T* weights, const T* bias, int channels,
            T* out, std::ptrdiff_t stride) {
  constexpr int kWidth = kLanes<T>;
  for (int first = 0; first < pixels; first += kWidth, in += kWidth * pixel) {
    const int count = std::min(kWidth, pixels - first);
    for (int c = 0; c < channels; ++c) {
      Vec<T> sums[kWidth];
      unrolled<kWidth>([&](auto i) ANODE_INLINE { sums[i] = Vec<T>{}; });
      for (int lane = 0; lane < pixel; lane += kWidth) {
        const Vec<T> w = load(weights + c * pixel + lane);
        if (count == kWidth) {
          unrolled<kWidth>([&](auto i) ANODE_INLINE {
            sums[i] += w * load(in + i * pixel + lane);
          });
        } else {
          // The last pixel again where there is none.
          unrolled<kWidth>([&](auto i) ANODE_INLINE {
            sums[i] += w * load(in + std::min<int>(i, count - 1) * pixel + lane);
          });
        }
      }
      Vec<T> total = sum_each<T>(sums);
      if (bias) total += bias[c];
      T* to = out + c * stride + first;
      if (count == kWidth) {
        store(to, total);
      } else {
        for (int i = 0; i < count; ++i) to[i] = total[i];
      }
    }
  }
}

template <class T>
T sum_of(const T* x, std::ptrdiff_t count) {
  Vec<T> sums{};
  std::ptrdiff_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) sums += load(x + i);
  T sum = 0;
  for (int lane = 0; lane < kLanes<T>; ++lane) sum += sums[lane];
  for (; i < count; ++i) sum += x[i];
  return sum;
}

// --- Winograd's transforms ------------------------------------------------------------------------
// A tile has 4x4 inputs and 2x2 outputs. Its 16 transformed numbers lie in 16 planes, each [tiles,
// pixel], `pixel` numbers a tile.

// B^T of four inputs.
template <class T>
ANODE_INLINE inline void transform_4(Vec<T> a, Vec<T> b, Vec<T> c, Vec<T> d, Vec<T>* out,
                                     int stride) {
  out[0] = a - c;
  out[stride] = b + c;
  out[2 * stride] = c - b;
  out[3 * stride] = b - d;
}

// B^T d B of each of `tiles` tiles side by side. `from`: the first one's corner, rows `row` numbers
// apart.
template <class T>
void transform_inputs(const T* from, std::ptrdiff_t row, int pixel, int tiles, T* out,
                      std::ptrdiff_t plane) {
  for (int lane = 0; lane < pixel; lane += kLanes<T>) {
    const T* in = from + lane;
    T* to = out + lane;
    Vec<T> left[8], right[8];  // two columns each, transformed; two tiles share two columns
    auto columns = [&](Vec<T>* column) ANODE_INLINE {
      unrolled<2>([&](auto j) ANODE_INLINE {
        const T* p = in + j * pixel;
        transform_4<T>(load(p), load(p + row), load(p + 2 * row), load(p + 3 * row),
                       column + 4 * j, 1);
      });
      in += 2 * pixel;
    };
    columns(left);
    for (int tile = 0; tile < tiles; ++tile, to += pixel) {
      columns(right);
      unrolled<4>([&](auto i) ANODE_INLINE {
        Vec<T> v[4];
        transform_4<T>(left[i], left[4 + i], right[i], right[4 + i], v, 1);
        unrolled<4>([&](auto j) ANODE_INLINE { store(to + (i * 4 + j) * plane, v[j]); });
      });
      unrolled<8>([&](auto i) ANODE_INLINE { left[i] = right[i]; });
    }
  }
}

// A x A^T of each of `tiles` tiles side by side: the cotangent of what `transform_outputs` reads.
// `from`: the first one's upper left output.
template <class T>
void transform_cotangents(const T* from, std::ptrdiff_t row, int pixel, int tiles, T* out,
                          std::ptrdiff_t plane) {
  for (int tile = 0; tile < tiles; ++tile) {
    for (int lane = 0; lane < pixel; lane += kLanes<T>) {
      const T* in = from + tile * 2 * pixel + lane;
      T* to = out + tile * pixel + lane;
      const Vec<T> a = load(in), b = load(in + pixel);
      const Vec<T> c = load(in + row), d = load(in + row + pixel);
      const Vec<T> first[4] = {a, a + c, a - c, -c}, second[4] = {b, b + d, b - d, -d};
      unrolled<4>([&](auto i) ANODE_INLINE {
        T* here = to + 4 * i * plane;
        store(here, first[i]);
        store(here + plane, first[i] + second[i]);
        store(here + 2 * plane, first[i] - second[i]);
        store(here + 3 * plane, -second[i]);
      });
    }
  }
}

// A^T m A of one tile, for one vector of lanes: two rows of two outputs.
template <class T>
ANODE_INLINE inline void transform_output(const T* m, std::ptrdiff_t plane, Vec<T>* out) {
  Vec<T> rows[8];
  unrolled<4>([&](auto j) ANODE_INLINE {
    const Vec<T> a = load(m + j * plane), b = load(m + (4 + j) * plane);
    const Vec<T> c = load(m + (8 + j) * plane), d = load(m + (12 + j) * plane);
    rows[j] = a + b + c;
    rows[4 + j] = b - c - d;
  });
  unrolled<2>([&](auto i) ANODE_INLINE {
    const Vec<T>* r = rows + 4 * i;
    out[2 * i] = r[0] + r[1] + r[2];
    out[2 * i + 1] = r[1] - r[2] - r[3];
  });
}

// U = G w G^T of a 3x3 kernel.
inline void transform_weights(const double* w, double* u) {
  auto g = [](double a, double b, double c, double* out, int stride) {
    out[0] = a;
    out[stride] = (a + b + c) / 2;
    out[2 * stride] = (a - b + c) / 2;
    out[3 * stride] = c;
  };
  double columns[12];
  for (int j = 0; j < 3; ++j) g(w[j], w[3 + j], w[6 + j], columns + j, 3);
  for (int i = 0; i < 4; ++i) {
    const double* c = columns + 3 * i;
    g(c[0], c[1], c[2], u + 4 * i, 1);
  }
}

// G^T u G, the cotangent of the kernel; plane[i] is entry i of u.
template <class T>
ANODE_INLINE inline void transform_weight_cotangent(const T* u, std::ptrdiff_t plane, Vec<T>* w) {
  Vec<T> rows[12];
  auto g = [](Vec<T> a, Vec<T> b, Vec<T> c, Vec<T> d, Vec<T>* out, int stride) ANODE_INLINE {
    const Vec<T> half_sum = (b + c) * T(0.5);
    out[0] = a + half_sum;
    out[stride] = (b - c) * T(0.5);
    out[2 * stride] = half_sum + d;
  };
  unrolled<4>([&](auto j) ANODE_INLINE {
    g(load(u + j * plane), load(u + (4 + j) * plane), load(u + (8 + j) * plane),
      load(u + (12 + j) * plane), rows + j, 4);
  });
  unrolled<3>([&](auto i) ANODE_INLINE {
    const Vec<T>* r = rows + 4 * i;
    g(r[0], r[1], r[2], r[3], w + 3 * i, 1);
  });
}

// --- the field ------------------------------------------------------------------------------------

struct ConvShape {
  std::int32_t channels;
  std::int32_t filters;
  std::int32_t activation;
  std::int32_t time_dependent;
};

// Where an evaluation takes place: images [batch, channels, height, width] and the time of each, at
// t[image * t_stride].
template <class T>
struct Images {
  std::int64_t batch;
  int height, width;
  const T* t;
  std::int64_t t_stride;
  const T* y;
};

// Where gradients go; null where one is not wanted. `t` has one number, or one for each image if
// times differ. Parameters as in the constructor of `Convolutions`.
template <class T>
struct ConvGradients {
  T *y, *t;
  T* parameters[6];

  bool of_parameters() const {
    return std::any_of(parameters, parameters + 6, [](const T* p) { return p; });
  }
};

// Some rows of tiles of one image.
struct Strip {
  std::int64_t image;
  int first_row, rows;  // of pixels
  int tile_rows;
};

template <class T>
class Convolutions {
 public:
  // `parameters`: weight [out, in, k, k] (the time's channel first, if it is an input) and bias
  // [out] of each layer, contiguous. `differentiates` says whether there will be gradients.
  Convolutions(const ConvShape& shape, const T* const* parameters, bool differentiates)
      : shape_(shape),
        activation_(Activation(shape.activation)),
        lead_(shape.time_dependent ? 1 : 0),
        channels_(shape.channels),
        filters_(shape.filters),
        pixel_(round_up(shape.filters, kLanes<T>)),
        state_(round_up(shape.channels, kLanes<T>)) {
    pack_ends(parameters);
    pack_middle(parameters[2], parameters[3], differentiates);
  }

  // Numbers in the record of an evaluation of images of this size.
  std::int64_t record_size(std::int64_t batch, int height, int width) const {
    return batch * height * width * pixel_;
  }

  // out = f(t, y), [batch, channels, height, width]. Fills the record, if there is one, with what
  // `vjp` needs: the second activation, or its argument where the slope is not computed from it.
  void evaluate(const Images<T>& images, T* out, T* record) const {
    const Layout layout = lay_out(images);
    WorkspacePool<Workspace> pool;
    parallel_for(images.batch * layout.strips, [&](std::int64_t begin, std::int64_t end) {
      typename WorkspacePool<Workspace>::Loan loan(
          pool, [&] { return std::make_unique<Workspace>(*this, layout, false); });
      for (std::int64_t i = begin; i < end; ++i) {
        evaluate_strip(images, layout, layout.strip(i), *loan, out, record);
      }
    });
  }

  // Gradients of sum(cotangent * f(t, y)) from the record of the evaluation.
  void vjp(const Images<T>& images, const T* record, const T* cotangent,
           const ConvGradients<T>& gradients) const {
    const Layout layout = lay_out(images);
    const std::int64_t strips = images.batch * layout.strips;
    const bool of_parameters = gradients.of_parameters();
    const std::size_t size = sums_.size;
    const std::int64_t groups = of_parameters ? sum_groups(strips, size * sizeof(T)) : strips;
    Buffer<T> sums(of_parameters ? groups * size : 0);
    std::vector<double> of_time(gradients.t ? strips : 0);
    WorkspacePool<Workspace> pool;
    parallel_for(groups, [&](std::int64_t begin, std::int64_t end) {
      typename WorkspacePool<Workspace>::Loan loan(
          pool, [&] { return std::make_unique<Workspace>(*this, layout, true); });
      for (std::int64_t g = begin; g < end; ++g) {
        T* sum = of_parameters ? sums.get() + g * size : nullptr;
        if (sum) std::fill_n(sum, size, T(0));
        for (std::int64_t i = g * strips / groups; i < (g + 1) * strips / groups; ++i) {
          const double time =
              strip_back(images, layout, layout.strip(i), *loan, record, cotangent, gradients, sum);
          if (gradients.t) of_time[i] = time;
        }
      }
    });
    if (gradients.t) add_up_time(images, layout.strips, of_time, gradients.t);
    if (!of_parameters) return;
    // One unit for each input of the 3x3 convolution, and one for all the rest.
    T* const* out = gradients.parameters;
    parallel_for((out[2] ? filters_ : 0) + 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        if (i > 0) {
          unpack_middle(sums.get(), groups, int(i - 1), out[2]);
        } else {
          unpack_rest(sums.get(), groups, out);
        }
      }
    });
  }

 private:
  // The numbers of tiles that share one reading of the weights: as many as keep their transformed
  // inputs and outputs in a core's cache, and enough to make reading the weights cheap.
  static constexpr std::size_t kTransformBytes = std::size_t(1) << 18;
  static constexpr int kLeastTiles = 24, kMostTiles = 128;
  // Pixels that go through the activation and the last layer at once.
  static constexpr int kBlockPixels = 64;
  // Memory of all groups' sums, and the most and least groups.
  static constexpr std::size_t kMostSumBytes = std::size_t(8) << 20;
  static constexpr std::int64_t kMostSums = 16, kLeastSums = 4;
  static constexpr int kBorders = 16;

  struct Layout {
    int height, width;
    int tile_rows, tile_columns;
    int strips;           // of an image
    int most_tiles;       // that are transformed at once
    int most_rows;        // of tiles in a strip
    std::ptrdiff_t row;   // numbers in a row of a patch
    std::ptrdiff_t plane;  // numbers in a plane of transformed tiles

    int strip_begin(int s) const { return int(std::int64_t(tile_rows) * s / strips); }

    Strip strip(std::int64_t i) const {
      const int s = int(i % strips), begin = strip_begin(s), count = strip_begin(s + 1) - begin;
      return {i / strips, 2 * begin, std::min(2 * count, height - 2 * begin), count};
    }
  };

  // A patch holds a layer's values for a strip with a pixel more on each side, zeros outside of the
  // image.
  struct Workspace {
    Buffer<T> memory;
    T *patch, *delta, *slope, *rows, *value, *block, *v, *m;
    T *bias1, *bias2, *bias3;
    T *sum1, *sum2;

    Workspace(const Convolutions& field, const Layout& layout, bool back) {
      const std::size_t patch_size = (2 * layout.most_rows + 2) * layout.row;
      const std::size_t strip_size =
          2 * std::size_t(layout.most_rows) * layout.width * field.pixel_;
      const std::size_t plane = 16 * layout.plane, pixel = field.pixel_, state = field.state_;
      const bool saves = back && !slope_from_value(field.activation_);
      const std::size_t sizes[] = {patch_size,
                                   back ? patch_size : 0,
                                   saves ? patch_size : 0,
                                   strip_size,
                                   saves ? strip_size + 2 * layout.width * pixel : 0,
                                   kBlockPixels * pixel,
                                   plane,
                                   plane,
                                   pixel,
                                   kBorders * pixel,
                                   state,
                                   pixel,
                                   kBorders * pixel};
      T** const parts[] = {&patch, &delta, &slope, &rows,  &value, &block, &v,
                           &m,     &bias1, &bias2, &bias3, &sum1,  &sum2};
      std::size_t total = 0;
      for (std::size_t size : sizes) total += size;
      memory = Buffer<T>(total);
      T* next = memory.get();
      for (std::size_t i = 0; i < std::size(sizes); ++i) {
        *parts[i] = next;
        next += sizes[i];
      }
    }
  };

  // Where the parts of a sum of weight gradients lie; u, of the transformed 3x3 weights, is the last.
  struct Sums {
    std::size_t w1, b1, t1, b2, t2, w3, b3, t3, u, size;
  };

  // --- weights

  void pack_ends(const T* const* parameters) {
    const T *w1 = parameters[0], *b1 = parameters[1], *w3 = parameters[4], *b3 = parameters[5];
    const int in1 = lead_ + channels_, in3 = lead_ + filters_;
    w1_ = zeros(channels_ * pixel_);
    b1_ = zeros(pixel_);
    t1_ = zeros(pixel_);
    w3_ = zeros(channels_ * pixel_);
    b3_ = zeros(state_);
    t3_ = zeros(state_);
    for (int k = 0; k < filters_; ++k) {
      b1_.get()[k] = b1[k];
      if (lead_) t1_.get()[k] = w1[k * in1];
    }
    for (int c = 0; c < channels_; ++c) {
      b3_.get()[c] = b3[c];
      if (lead_) t3_.get()[c] = w3[c * in3];
    }
    for (int k = 0; k < filters_; ++k) {
      for (int c = 0; c < channels_; ++c) {
        w1_.get()[c * pixel_ + k] = w1[k * in1 + lead_ + c];
        w3_.get()[c * pixel_ + k] = w3[c * in3 + lead_ + k];
      }
    }
  }

  void pack_middle(const T* weight, const T* bias, bool differentiates) {
    const int in = lead_ + filters_;
    const std::size_t size = std::size_t(16) * filters_ * pixel_;
    b2_ = zeros(pixel_);
    share_ = zeros(kBorders * pixel_);
    u_ = zeros(size);
    if (differentiates) u_back_ = zeros(size);
    for (int k = 0; k < filters_; ++k) {
      b2_.get()[k] = bias[k];
      for (int border = 0; lead_ && border < kBorders; ++border) {
        T sum = 0;
        for (int tap = 0; tap < 9; ++tap) {
          if (inside(border, tap)) sum += weight[std::size_t(k) * in * 9 + tap];
        }
        share_.get()[border * pixel_ + k] = sum;
      }
    }
    std::vector<Column> columns;
    for (int k = 0; k < filters_; ++k) columns.push_back(packed_column(k));
    parallel_for(filters_, [&](std::int64_t begin, std::int64_t end) {
      for (int i = 0; i < filters_; ++i) {
        for (int out = int(begin); out < end; ++out) {
          const T* taps = weight + (std::size_t(out) * in + lead_ + i) * 9;
          double w[9], u[16];
          std::copy_n(taps, 9, w);
          transform_weights(w, u);
          const std::size_t plane = std::size_t(filters_) * pixel_;
          T* to = u_.get() + columns[out].begin + i * columns[out].stride;
          for (int xi = 0; xi < 16; ++xi) to[xi * plane] = T(u[xi]);
          if (!differentiates) continue;
          // The kernel turned by 180 degrees: G's first and last rows change places.
          constexpr int kTurned[] = {3, 1, 2, 0};
          to = u_back_.get() + columns[i].begin + out * columns[i].stride;
          for (int xi = 0; xi < 16; ++xi) {
            to[(kTurned[xi / 4] * 4 + kTurned[xi % 4]) * plane] = T(u[xi]);
          }
        }
      }
    });
  }

  // Where an output's numbers lie in a packed plane: at begin + input * stride.
  struct Column {
    std::size_t begin, stride;
  };

  Column packed_column(int output) const {
    const int vectors = pixel_ / kLanes<T>;
    int p = 0;
    while (panel_begin(vectors, p + 1) * kLanes<T> <= output) ++p;
    const std::size_t first = panel_begin(vectors, p) * kLanes<T>;
    return {first * filters_ + output - first, panel_begin(vectors, p + 1) * kLanes<T> - first};
  }

  static Buffer<T> zeros(std::size_t size) {
    Buffer<T> buffer(size);
    std::fill_n(buffer.get(), size, T(0));
    return buffer;
  }

  // --- borders
  // A pixel's border says where it has no neighbours: 1 left, 2 right, 4 above, 8 below.

  static int border(int i, int count) { return (i == 0 ? 1 : 0) + (i == count - 1 ? 2 : 0); }

  // Whether a tap of the kernel is inside the image.
  static bool inside(int border, int tap) {
    const int x = tap % 3, y = tap / 3;
    return !((border & 1 && x == 0) || (border & 2 && x == 2) || (border & 4 && y == 0) ||
             (border & 8 && y == 2));
  }

  // --- strips

  Layout lay_out(const Images<T>& images) const {
    Layout layout{};
    layout.height = images.height;
    layout.width = images.width;
    layout.tile_rows = (images.height + 1) / 2;
    layout.tile_columns = (images.width + 1) / 2;
    const std::size_t bytes = 16 * sizeof(T) * pixel_;
    const int tiles = std::clamp(int(kTransformBytes / bytes), kLeastTiles, kMostTiles);
    const int rows = std::clamp(tiles / layout.tile_columns, 1, layout.tile_rows);
    layout.strips = (layout.tile_rows + rows - 1) / rows;
    layout.most_rows = (layout.tile_rows + layout.strips - 1) / layout.strips;
    layout.most_tiles = std::min(tiles, layout.most_rows * layout.tile_columns);
    layout.row = std::ptrdiff_t(2 * layout.tile_columns + 2) * pixel_;
    // Planes that are a multiple of 4 kB apart would share the same few lines of the first cache.
    constexpr int kPage = 4096 / sizeof(T), kLine = 64 / sizeof(T);
    layout.plane = round_up(layout.most_tiles * pixel_, kPage) + round_up(pixel_, kLine) + kLine;
    return layout;
  }

  // Calls f(first, count) for pieces of a strip's tiles.
  template <class F>
  static void for_pieces(const Layout& layout, const Strip& strip, F f) {
    const int tiles = strip.tile_rows * layout.tile_columns;
    const int pieces = (tiles + layout.most_tiles - 1) / layout.most_tiles;
    for (int p = 0; p < pieces; ++p) {
      const int first = int(std::int64_t(tiles) * p / pieces);
      f(first, int(std::int64_t(tiles) * (p + 1) / pieces) - first);
    }
  }

  // Calls f(row, column, count, index) for runs of tiles side by side; `index` counts from 0.
  template <class F>
  static void for_runs(const Layout& layout, int first, int count, F f) {
    for (int tile = first; tile < first + count;) {
      const int row = tile / layout.tile_columns, column = tile % layout.tile_columns;
      const int run = std::min(layout.tile_columns - column, first + count - tile);
      f(row, column, run, tile - first);
      tile += run;
    }
  }

  // Numbers before a strip's first pixel in an image of `numbers` numbers a pixel.
  static std::ptrdiff_t offset(const Layout& layout, const Strip& strip, int numbers) {
    return (strip.image * layout.height + strip.first_row) * layout.width * numbers;
  }

  const T* state(const Images<T>& images, const T* y, std::int64_t image, int row) const {
    return y + (image * channels_ * images.height + row) * images.width;
  }

  // Biases with the time's share.
  void set_biases(T time, Workspace& w) const {
    if (!lead_) time = 0;
    auto add = [time](const T* bias, const T* share, T* to, int count) {
      for (int i = 0; i < count; i += kLanes<T>) {
        store(to + i, load(bias + i) + time * load(share + i));
      }
    };
    add(b1_.get(), t1_.get(), w.bias1, pixel_);
    for (int border = 0; border < kBorders; ++border) {
      add(b2_.get(), share_.get() + border * pixel_, w.bias2 + border * pixel_, pixel_);
    }
    add(b3_.get(), t3_.get(), w.bias3, state_);
  }

  // Fills a patch: fill(row of the image, where its first pixel goes) for rows in the image.
  template <class F>
  void fill_patch(const Layout& layout, const Strip& strip, T* patch, F fill) const {
    const std::ptrdiff_t inner = std::ptrdiff_t(layout.width) * pixel_;
    for (int i = 0; i < 2 * strip.tile_rows + 2; ++i) {
      T* to = patch + i * layout.row;
      const int row = strip.first_row - 1 + i;
      if (row < 0 || row >= layout.height) {
        std::fill_n(to, layout.row, T(0));
        continue;
      }
      std::fill_n(to, pixel_, T(0));
      std::fill(to + pixel_ + inner, to + layout.row, T(0));
      fill(row, to + pixel_);
    }
  }

  // The first layer and its activation; slopes into a patch of their own, if they are wanted.
  void first_layer(const Images<T>& images, const Layout& layout, const Strip& strip, Workspace& w,
                   bool slopes) const {
    const std::ptrdiff_t size = std::ptrdiff_t(images.height) * images.width;
    fill_patch(layout, strip, w.patch, [&](int row, T* to) {
      const T* y = state(images, images.y, strip.image, row);
      product<T>(images.width, channels_, {y, 1, size}, {w1_.get(), pixel_, false}, {w.bias1}, to);
      const std::size_t count = std::size_t(images.width) * pixel_;
      if (slopes) {
        activate_saving(activation_, to, w.slope + (to - w.patch), count);
      } else {
        activate(activation_, to, count);
      }
    });
  }

  // The 16 products of a piece of tiles, w.v times u into w.m.
  void multiply(const T* u, int tiles, const Layout& layout, Workspace& w) const {
    for (int xi = 0; xi < 16; ++xi) {
      product<T>(tiles, filters_, {w.v + xi * layout.plane, pixel_, 1},
                 {u + std::size_t(xi) * filters_ * pixel_, pixel_, true}, {},
                 w.m + xi * layout.plane);
    }
  }

  // The 3x3 convolution of a patch by transformed weights, into the strip's rows of an image. Adds
  // the bias of each pixel's border, if it is not null.
  void convolve(const T* patch, const T* u, const T* bias, const Layout& layout, const Strip& strip,
                Workspace& w, T* out) const {
    for_pieces(layout, strip, [&](int first, int count) {
      for_runs(layout, first, count, [&](int row, int column, int run, int index) {
        const T* corner = patch + 2 * row * layout.row + 2 * column * pixel_;
        transform_inputs(corner, layout.row, pixel_, run, w.v + index * pixel_, layout.plane);
      });
      multiply(u, count, layout, w);
      for_runs(layout, first, count, [&](int row, int column, int run, int index) {
        for (int i = 0; i < run; ++i) {
          write_tile(w.m + (index + i) * pixel_, 2 * row, 2 * (column + i), bias, layout, strip,
                     out);
        }
      });
    });
  }

  void write_tile(const T* m, int row, int column, const T* bias, const Layout& layout,
                  const Strip& strip, T* out) const {
    const bool below = row + 1 < strip.rows, right = column + 1 < layout.width;
    const std::ptrdiff_t next_row = std::ptrdiff_t(layout.width) * pixel_;
    out += row * next_row + column * pixel_;
    const T* biases[4] = {};
    for (int i = 0; bias && i < 4; ++i) {
      const int y = strip.first_row + row + i / 2, x = column + i % 2;
      biases[i] = bias + (4 * border(y, layout.height) + border(x, layout.width)) * pixel_;
    }
    for (int lane = 0; lane < pixel_; lane += kLanes<T>) {
      Vec<T> tile[4];
      transform_output(m + lane, layout.plane, tile);
      if (bias) unrolled<4>([&](auto i) ANODE_INLINE { tile[i] += load(biases[i] + lane); });
      T* to = out + lane;
      store(to, tile[0]);
      if (right) store(to + pixel_, tile[1]);
      if (below) store(to + next_row, tile[2]);
      if (below && right) store(to + next_row + pixel_, tile[3]);
    }
  }

  void evaluate_strip(const Images<T>& images, const Layout& layout, const Strip& strip,
                      Workspace& w, T* out, T* record) const {
    set_biases(images.t[strip.image * images.t_stride], w);
    first_layer(images, layout, strip, w, false);
    T* rows = record ? record + offset(layout, strip, pixel_) : w.rows;
    convolve(w.patch, u_.get(), w.bias2, layout, strip, w, rows);
    const bool copies = record && !slope_from_value(activation_);
    const std::ptrdiff_t size = std::ptrdiff_t(images.height) * images.width;
    T* to = out + strip.image * channels_ * size + std::ptrdiff_t(strip.first_row) * images.width;
    const std::ptrdiff_t pixels = std::ptrdiff_t(strip.rows) * images.width;
    for (std::ptrdiff_t i = 0; i < pixels; i += kBlockPixels) {
      const int count = int(std::min<std::ptrdiff_t>(kBlockPixels, pixels - i));
      T* hidden = rows + i * pixel_;
      if (copies) {
        std::copy_n(hidden, count * pixel_, w.block);
        hidden = w.block;
      }
      activate(activation_, hidden, std::size_t(count) * pixel_);
      reduce<T>(hidden, pixel_, count, w3_.get(), w.bias3, channels_, to + i, size);
    }
  }

  // --- gradients

  // Groups of strips, at least one, whose sums take `bytes` each.
  static std::int64_t sum_groups(std::int64_t strips, std::size_t bytes) {
    std::int64_t groups = std::clamp<std::int64_t>(strips, 1, kMostSums);
    while (groups > kLeastSums && groups * bytes > kMostSumBytes) groups /= 2;
    return groups;
  }

  // sums += x of each of `pixels` pixels.
  void add_pixels(const T* x, std::ptrdiff_t pixels, T* sums) const {
    for (int lane = 0; lane < pixel_; lane += kLanes<T>) {
      Vec<T> sum = load(sums + lane);
      for (std::ptrdiff_t i = 0; i < pixels; ++i) sum += load(x + i * pixel_ + lane);
      store(sums + lane, sum);
    }
  }

  double dot(const T* a, const T* b, int count) const {
    double sum = 0;
    for (int i = 0; i < count; ++i) sum += double(a[i]) * double(b[i]);
    return sum;
  }

  // The cotangent of the second layer's sums, into w.delta, and the second activation's values:
  // the record, or w.value. Also sums of the cotangents of each border, into w.sum2.
  const T* second_delta(const Images<T>& images, const Layout& layout, const Strip& strip,
                        Workspace& w, const T* record, const T* cotangent) const {
    const std::ptrdiff_t size = std::ptrdiff_t(images.height) * images.width;
    const std::ptrdiff_t row_size = std::ptrdiff_t(images.width) * pixel_;
    const bool kept = slope_from_value(activation_);
    std::fill_n(w.sum2, kBorders * pixel_, T(0));
    fill_patch(layout, strip, w.delta, [&](int row, T* to) {
      const T* g = state(images, cotangent, strip.image, row);
      product<T>(images.width, channels_, {g, 1, size}, {w3_.get(), pixel_, false}, {}, to);
      const T* value = record + (strip.image * images.height + row) * row_size;
      const bool mine = row >= strip.first_row && row < strip.first_row + strip.rows;
      if (!kept) {
        // Behind the strip's own rows, one for a neighbour's and one for slopes.
        const int row_of = mine ? row - strip.first_row : 2 * layout.most_rows;
        T* own = w.value + row_of * row_size;
        T* slope = w.value + (2 * layout.most_rows + 1) * row_size;
        std::copy_n(value, row_size, own);
        activate_saving(activation_, own, slope, row_size);
        times_slope(activation_, to, static_cast<const T*>(own), static_cast<const T*>(slope),
                    row_size);
      } else {
        times_slope(activation_, to, value, static_cast<const T*>(nullptr), row_size);
      }
      if (!mine) return;
      T* sums = w.sum2 + 4 * border(row, images.height) * pixel_;
      const int last = images.width - 1;
      add_pixels(to, 1, sums + border(0, images.width) * pixel_);
      if (last < 1) return;
      add_pixels(to + pixel_, last - 1, sums);
      add_pixels(to + last * pixel_, 1, sums + border(last, images.width) * pixel_);
    });
    return kept ? record + offset(layout, strip, pixel_) : w.value;
  }

  // Adds the gradient of the transformed 3x3 weights.
  void add_middle_gradient(const Layout& layout, const Strip& strip, Workspace& w, T* sum) const {
    for_pieces(layout, strip, [&](int first, int count) {
      for_runs(layout, first, count, [&](int row, int column, int run, int index) {
        const std::ptrdiff_t corner = 2 * row * layout.row + 2 * column * pixel_;
        transform_inputs(w.patch + corner, layout.row, pixel_, run, w.v + index * pixel_,
                         layout.plane);
        transform_cotangents(w.delta + corner + layout.row + pixel_, layout.row, pixel_, run,
                             w.m + index * pixel_, layout.plane);
      });
      for (int xi = 0; xi < 16; ++xi) {
        product<T>(filters_, count, {w.v + xi * layout.plane, 1, pixel_},
                   {w.m + xi * layout.plane, pixel_, false}, {nullptr, true},
                   sum + std::size_t(xi) * filters_ * pixel_);
      }
    });
  }

  // The strip's part of all gradients: writes y's, adds the parameters' to `sum`, if that is not
  // null, and returns the time's.
  double strip_back(const Images<T>& images, const Layout& layout, const Strip& strip, Workspace& w,
                    const T* record, const T* cotangent, const ConvGradients<T>& gradients,
                    T* sum) const {
    T* const* wanted = gradients.parameters;
    const std::ptrdiff_t size = std::ptrdiff_t(images.height) * images.width;
    const int pixels = strip.rows * images.width;
    const T time = lead_ ? images.t[strip.image * images.t_stride] : T(0);
    const T* g = state(images, cotangent, strip.image, strip.first_row);
    set_biases(time, w);
    const T* value = second_delta(images, layout, strip, w, record, cotangent);
    first_layer(images, layout, strip, w, !slope_from_value(activation_));
    if (sum && wanted[4]) {
      product<T>(channels_, pixels, {g, size, 1}, {value, pixel_, false}, {nullptr, true},
                 sum + sums_.w3);
    }
    if (sum && wanted[2]) add_middle_gradient(layout, strip, w, sum + sums_.u);

    std::fill_n(w.sum1, pixel_, T(0));
    if (gradients.y || gradients.t || wanted[0] || wanted[1]) {
      convolve(w.delta, u_back_.get(), nullptr, layout, strip, w, w.rows);
      const std::ptrdiff_t row_size = std::ptrdiff_t(images.width) * pixel_;
      for (int row = 0; row < strip.rows; ++row) {
        const std::ptrdiff_t at = (row + 1) * layout.row + pixel_;
        times_slope(activation_, w.rows + row * row_size, static_cast<const T*>(w.patch + at),
                    static_cast<const T*>(w.slope + at), row_size);
      }
      add_pixels(w.rows, pixels, w.sum1);
      const T* y = state(images, images.y, strip.image, strip.first_row);
      if (sum && wanted[0]) {
        product<T>(channels_, pixels, {y, size, 1}, {w.rows, pixel_, false}, {nullptr, true},
                   sum + sums_.w1);
      }
      if (gradients.y) {
        T* to = gradients.y + (y - images.y);
        reduce<T>(w.rows, pixel_, pixels, w1_.get(), nullptr, channels_, to, size);
      }
    }
    return add_biases(g, size, pixels, time, w, sum);
  }

  // What only needs sums over pixels: the gradients of biases and time's weights, added to `sum`,
  // and that of the time.
  double add_biases(const T* g, std::ptrdiff_t size, int pixels, T time, Workspace& w,
                    T* sum) const {
    double of_time = dot(t1_.get(), w.sum1, filters_);
    for (int border = 0; lead_ && border < kBorders; ++border) {
      of_time += dot(share_.get() + border * pixel_, w.sum2 + border * pixel_, filters_);
    }
    auto add = [](T* to, T scale, const T* x, int count) {
      for (int i = 0; i < count; i += kLanes<T>) store(to + i, load(to + i) + scale * load(x + i));
    };
    if (sum) {
      add(sum + sums_.b1, T(1), w.sum1, pixel_);
      add(sum + sums_.t1, time, w.sum1, pixel_);
      for (int border = 0; border < kBorders; ++border) {
        const T* part = w.sum2 + border * pixel_;
        add(sum + sums_.b2, T(1), part, pixel_);
        for (int tap = 0; lead_ && tap < 9; ++tap) {
          if (inside(border, tap)) add(sum + sums_.t2 + tap * pixel_, time, part, pixel_);
        }
      }
    }
    for (int c = 0; c < channels_; ++c) {
      const T total = sum_of(g + c * size, pixels);
      of_time += double(t3_.get()[c]) * double(total);
      if (!sum) continue;
      sum[sums_.b3 + c] += total;
      sum[sums_.t3 + c] += time * total;
    }
    return lead_ ? of_time : 0;
  }

  void add_up_time(const Images<T>& images, int strips, const std::vector<double>& parts,
                   T* gradient) const {
    double sum = 0;
    for (std::int64_t image = 0; image < images.batch; ++image) {
      if (images.t_stride) sum = 0;
      for (int s = 0; s < strips; ++s) sum += parts[image * strips + s];
      if (images.t_stride) gradient[image] = T(sum);
    }
    if (!images.t_stride) *gradient = T(sum);
  }

  Sums lay_out_sums() const {
    Sums sums{};
    auto take = [&](std::size_t size) { return std::exchange(sums.size, sums.size + size); };
    sums.w1 = take(channels_ * pixel_);
    sums.b1 = take(pixel_);
    sums.t1 = take(pixel_);
    sums.b2 = take(pixel_);
    sums.t2 = take(9 * pixel_);
    sums.w3 = take(channels_ * pixel_);
    sums.b3 = take(state_);
    sums.t3 = take(state_);
    sums.u = take(std::size_t(16) * filters_ * pixel_);
    return sums;
  }

  // Adds to `count` numbers of the first group's sums those of the others, in their order.
  void add_groups(T* first, std::int64_t groups, std::size_t count) const {
    for (std::int64_t g = 1; g < groups; ++g) {
      const T* other = first + g * sums_.size;
      for (std::size_t i = 0; i < count; i += kLanes<T>) {
        store(first + i, load(first + i) + load(other + i));
      }
    }
  }

  // Writes the gradient of the 3x3 weights of one input. Overwrites sums, here and below.
  void unpack_middle(T* sums, std::int64_t groups, int input, T* weight) const {
    const std::ptrdiff_t plane = std::ptrdiff_t(filters_) * pixel_;
    const int in = lead_ + filters_;
    T* from = sums + sums_.u + std::ptrdiff_t(input) * pixel_;
    for (int xi = 0; xi < 16; ++xi) add_groups(from + xi * plane, groups, pixel_);
    for (int lane = 0; lane < pixel_; lane += kLanes<T>) {
      Vec<T> taps[9];
      transform_weight_cotangent(from + lane, plane, taps);
      for (int l = 0; l < std::min(kLanes<T>, filters_ - lane); ++l) {
        T* to = weight + (std::size_t(lane + l) * in + lead_ + input) * 9;
        unrolled<9>([&](auto tap) ANODE_INLINE { to[tap] = taps[tap][l]; });
      }
    }
  }

  // Writes all other gradients of parameters, those excepted that are null.
  void unpack_rest(T* sum, std::int64_t groups, T* const* out) const {
    const int in1 = lead_ + channels_, in = lead_ + filters_;
    add_groups(sum, groups, sums_.u);
    for (int k = 0; k < filters_; ++k) {
      if (out[1]) out[1][k] = sum[sums_.b1 + k];
      if (out[3]) out[3][k] = sum[sums_.b2 + k];
      if (out[0] && lead_) out[0][k * in1] = sum[sums_.t1 + k];
      for (int c = 0; out[0] && c < channels_; ++c) {
        out[0][k * in1 + lead_ + c] = sum[sums_.w1 + c * pixel_ + k];
      }
      for (int tap = 0; out[2] && lead_ && tap < 9; ++tap) {
        out[2][std::size_t(k) * in * 9 + tap] = sum[sums_.t2 + tap * pixel_ + k];
      }
    }
    for (int c = 0; c < channels_; ++c) {
      if (out[5]) out[5][c] = sum[sums_.b3 + c];
      if (out[4] && lead_) out[4][c * in] = sum[sums_.t3 + c];
      for (int k = 0; out[4] && k < filters_; ++k) {
        out[4][c * in + lead_ + k] = sum[sums_.w3 + c * pixel_ + k];
      }
    }
  }

  const ConvShape shape_;
  const Activation activation_;
  const int lead_;  // channels before the state's: 1 for the time
  const int channels_, filters_;
  const int pixel_, state_;  // filters and channels, rounded up to full vectors
  const Sums sums_ = lay_out_sums();
  Buffer<T> w1_, b1_, t1_, w3_, b3_, t3_;  // w: [channels, pixel_]; t: the weights of the time
  Buffer<T> u_, u_back_;                   // of the convolution, and of its transpose
  Buffer<T> b2_, share_;                   // share: of t = 1 at a pixel of each border
};

}  // namespace anode

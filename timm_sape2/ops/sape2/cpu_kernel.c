/* SaPE2 attention on a CPU, forward and backward; README.md beside this file has the maths. With a direct bias it is not
 * the distance of two patches' readings, but what one patch reads for the column and for the row of the other.
 *
 * A thread works on one head of one image at a time, in memory of its own that stays in the cache. Tokens are P prefix
 * tokens and N = H * W patches in raster order, T = P + N. A signature of a patch has an entry for every patch of its row
 * (column). What there is along lines lies in blocks of BLOCK patches, (blocks, entries, BLOCK), so that a vector holds
 * one entry of neighbouring patches, and a block is read in one go.
 *
 * A tile is a range of tokens (rows, which are queries) against another (columns, which are keys). All distances come
 * from differences. NaN spreads, and patches with equal signatures get a distance and a gradient of exactly 0.
 */
#if defined(__AVX__)
#include <immintrin.h>
#endif
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

#ifdef SAPE2_DOUBLE
typedef double real;
typedef int64_t integer;
#else
typedef float real;
typedef int32_t integer;
#endif

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

enum { LANES = VECTOR_BYTES / sizeof(real), BLOCK = 2 * LANES };
enum { ROWS = 16, OTHERS = 64, DEPTH = 256 };         /* rows, columns and terms of sums that are worked on at a time */
enum { AXES = 2, MOST_THREADS = 256 };
enum { QUERY, KEY, VALUE, GATE_KEY, LOGIT_QUERY, LOGIT_KEY, INPUTS };
enum { UNIT_GATES, KEY_GATES, OTHER_GATES };

typedef real vec __attribute__((vector_size(VECTOR_BYTES)));
typedef integer mask __attribute__((vector_size(VECTOR_BYTES)));
typedef real unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias));

#define INLINE static inline __attribute__((always_inline))

/* A tensor (images, heads, tokens, channels) with the steps between its entries, of which channels lie side by side. */
typedef struct {
    real *data;
    int64_t image, head, token;
} view;

/* What a call works on; cpu_library.py beside this file has the same structure. */
typedef struct {
    int64_t images, heads, prefix, height, width, head_dim;
    int64_t positions;      /* rows n of a table */
    int64_t axes[AXES];     /* 1 for signatures along rows, 1 for signatures along columns, else 0 */
    int64_t contents[2];    /* 1 if queries, 1 if keys read the embeddings, else 0 */
    int64_t direct;         /* a direct bias, for which both axes are needed, and queries that read */
    int64_t gates;          /* UNIT_GATES (all are 1), KEY_GATES, or OTHER_GATES from input GATE_KEY */
    int64_t rotated;        /* logits come from inputs LOGIT_QUERY and LOGIT_KEY */
    int64_t logits_at_once; /* forward, of a head; one with more is worked on in tiles of rows */
    int64_t tile;           /* backward, patches on each side of a tile */
    int64_t threads;
    double scale;
    view inputs[INPUTS];
    real *tables;           /* (tables * n, d) */
    view output;
    real *highest, *sums;   /* (images, heads, T) of each row of logits, and of e^(logit - highest) */
    view grad_output;
    view grads[INPUTS];
    real *grad_tables;      /* (images, heads, tables * n, d), to be summed over images and heads */
    real *memory;           /* for each thread as much as sape2_memory says */
} call;

INLINE vec load(const real *from) { return *(const unaligned *)from; }
INLINE void store(real *to, vec x) { *(unaligned *)to = x; }
INLINE vec all(real x) { return x - (vec){0}; }
INLINE vec either(mask which, vec yes, vec no) { return (vec)((which & (mask)yes) | (~which & (mask)no)); }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t whole(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

INLINE vec load_some(const real *from, int64_t count, real rest)
{
    if (count >= LANES) return load(from);
    vec x = all(rest);
    for (int64_t l = 0; l < count; l++) x[l] = from[l];
    return x;
}

INLINE void store_some(real *to, vec x, int64_t count)
{
    if (count >= LANES) store(to, x);
    else
        for (int64_t l = 0; l < count; l++) to[l] = x[l];
}

INLINE real sum_of(vec x)
{
    real part[LANES];
    memcpy(part, &x, sizeof x);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int l = 0; l < half; l++) part[l] += part[l + half];
    return part[0];
}

/* 1 / sqrt(x), 0 for 0. */
INLINE vec inverse_root(vec x)
{
#if defined(__AVX512F__) && !defined(SAPE2_DOUBLE)
    vec y = _mm512_rsqrt14_ps(x);
    y *= 1.5f - 0.5f * x * y * y;
#elif defined(__AVX__) && !defined(SAPE2_DOUBLE)
    vec y = _mm256_rsqrt_ps(x);
    y *= 1.5f - 0.5f * x * y * y;
#else
    const vec safe = either(x == 0, all(1), x);
    vec y = safe;
    for (int l = 0; l < LANES; l++) y[l] = 1 / (sizeof(real) == 4 ? sqrtf(safe[l]) : sqrt(safe[l]));
#endif
    return either(x == 0, (vec){0}, y);
}

/* e^x, 0 below the normal numbers. */
INLINE vec exponential(vec x)
{
#ifdef SAPE2_DOUBLE
    for (int l = 0; l < LANES; l++) x[l] = exp(x[l]);
    return x;
#else
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number, which ends up in the last bits */
    vec near = either(x < -87.0f, all(-87.0f), x);
    near = either(near > 88.0f, all(88.0f), near);
    vec shifted = near * 1.44269504088896341f + shift;
    vec rounded = shifted - shift;
    vec rest = near - rounded * 0.693359375f + rounded * 2.12194440e-4f;
    vec y = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * rest + 8.3334519073e-3f;
    y = y * rest + 4.1665795894e-2f;
    y = y * rest + 1.6666665459e-1f;
    y = y * rest + 5.0000001201e-1f;
    y = y * (rest * rest) + rest + 1.0f;
    vec power = (vec)(((mask)shifted << 23) + (127 << 23));
    return either(x < -87.0f, (vec){0}, y * power);
#endif
}

INLINE vec sigmoid(vec x) { return 1 / (1 + exponential(-x)); }

/* Products of matrices --------------------------------------------------------------------------------------------- */

/* C (rows, width) = A (rows, depth) B (depth, width), for at most 6 rows and BLOCK columns, or added to C. */
INLINE void product_block(const int rows, const int halves, const real *a, int64_t a_row, int64_t a_step, const real *b,
                          int64_t b_step, int64_t depth, real *c, int64_t c_row, int64_t width, int add)
{
    vec sum[6][2] = {{{0}}};
    for (int64_t k = 0; k < depth; k++) {
        const vec first = load(b + k * b_step), second = halves == 2 ? load(b + k * b_step + LANES) : (vec){0};
        for (int r = 0; r < rows; r++) {
            const real factor = a[r * a_row + k * a_step];
            sum[r][0] += factor * first;
            if (halves == 2) sum[r][1] += factor * second;
        }
    }
    for (int r = 0; r < rows; r++, c += c_row)
        for (int half = 0; half < halves; half++) {
            const int64_t count = width - half * LANES;
            if (add) sum[r][half] += load_some(c + half * LANES, count, 0);
            store_some(c + half * LANES, sum[r][half], count);
        }
}

INLINE void product_rows(const int halves, const real *a, int64_t a_row, int64_t a_step, const real *b, int64_t b_step,
                         int64_t rows, int64_t depth, real *c, int64_t c_row, int64_t width, int add)
{
#define STEP(count)                                                                                                    \
    for (; rows >= count; rows -= count, a += count * a_row, c += count * c_row)                                       \
    product_block(count, halves, a, a_row, a_step, b, b_step, depth, c, c_row, width, add)
    STEP(6);
    STEP(4);
    STEP(2);
    STEP(1);
#undef STEP
}

/* C (rows, columns) = A (rows, depth) B (depth, columns), or added to C. Entries of A are a_row and a_step apart, those
 * of C lie in rows. B comes in panels of BLOCK columns b_panel apart, with rows that are b_step apart and can be read to
 * the end of a vector. */
static void multiply(const real *a, int64_t a_row, int64_t a_step, const real *b, int64_t b_step, int64_t b_panel,
                     int64_t rows, int64_t columns, int64_t depth, real *c, int64_t c_row, int add)
{
    for (int64_t k = 0; k < depth; k += DEPTH, a += DEPTH * a_step, b += DEPTH * b_step, add = 1) {
        const int64_t some = least(DEPTH, depth - k);
        for (int64_t j = 0; j < columns; j += BLOCK) {
            const real *panel = b + j / BLOCK * b_panel;
            const int64_t width = least(BLOCK, columns - j);
            if (width > LANES) product_rows(2, a, a_row, a_step, panel, b_step, rows, some, c + j, c_row, width, add);
            else product_rows(1, a, a_row, a_step, panel, b_step, rows, some, c + j, c_row, width, add);
        }
    }
}

/* Turn rows of a matrix into panels that hold BLOCK of them as columns, filled up with zeros to the end of a vector. */
static void transpose_to_panels(const real *from, int64_t step, int64_t rows, int64_t columns, real *to)
{
    for (int64_t j = 0; j < rows; j += BLOCK, from += BLOCK * step, to += columns * BLOCK) {
        const int64_t some = least(BLOCK, rows - j), full = some / LANES * LANES;
        for (int64_t c = 0; c < columns && full < some; c++) store(to + c * BLOCK + full, all(0));
        for (int64_t l = 0; l < some; l++)
            for (int64_t c = 0; c < columns; c++) to[c * BLOCK + l] = from[l * step + c];
    }
}

/* Threads ---------------------------------------------------------------------------------------------------------- */

typedef void work(const call *of, int64_t head, real *memory);
typedef void parallel(void (*function)(void *), void *arguments, unsigned threads, unsigned flags);

typedef struct {
    work *function;
    const call *of;
    int64_t memory;         /* of a thread */
    atomic_int_fast64_t next_head, next_thread;
} job;

static parallel *openmp;
static pid_t openmp_process;

/* Run on the threads of this OpenMP library, given its GOMP_parallel; they may still spin, waiting for more to do. */
void sape2_use_openmp(parallel *function) { openmp = function, openmp_process = getpid(); }

static void take_heads(void *arguments)
{
    job *shared = arguments;
    real *memory = shared->of->memory + atomic_fetch_add(&shared->next_thread, 1) * shared->memory;
    for (int64_t head; (head = atomic_fetch_add(&shared->next_head, 1)) < shared->of->images * shared->of->heads;)
        shared->function(shared->of, head, memory);
}

static void *take_heads_in_thread(void *arguments)
{
    take_heads(arguments);
    return NULL;
}

/* Call a function for every head of every image, on the threads that there may be. */
static void share(work *function, const call *of, int64_t memory)
{
    job shared = {function, of, memory, 0, 0};
    const int64_t threads = least(of->threads, MOST_THREADS);
    if (threads < 2 || of->images * of->heads < 2) {
        take_heads(&shared);
    } else if (openmp && openmp_process == getpid()) { /* a forked process has none of its threads */
        openmp(take_heads, &shared, (unsigned)threads, 0);
    } else {
        pthread_t helpers[MOST_THREADS];
        int64_t started = 0;
        while (started < threads - 1 && pthread_create(helpers + started, NULL, take_heads_in_thread, &shared) == 0)
            started++;
        take_heads(&shared);
        while (started > 0) pthread_join(helpers[--started], NULL);
    }
}

/* A head ----------------------------------------------------------------------------------------------------------- */

INLINE int64_t patches_of(const call *of) { return of->height * of->width; }
INLINE int64_t tokens_of(const call *of) { return of->prefix + patches_of(of); }
INLINE int64_t length_of(const call *of, int axis) { return axis ? of->height : of->width; }
INLINE int64_t tables_of(const call *of) { return of->axes[0] + of->axes[1]; }
INLINE int64_t contents_of(const call *of) { return of->contents[0] + of->contents[1]; }

/* Entries of the signatures along all axes from one content. */
INLINE int64_t entries_of(const call *of) { return of->axes[0] * of->width + of->axes[1] * of->height; }

/* Distances that a pair of patches has, along an axis and in all. */
INLINE int64_t slots_along(const call *of, int axis) { return of->direct ? 0 : of->axes[axis] * contents_of(of); }
INLINE int64_t slots_of(const call *of) { return slots_along(of, 0) + slots_along(of, 1); }

typedef struct {
    const call *of;
    int64_t tokens, patches, pitch;
    real *inputs[INPUTS];   /* (T, pitch): channels filled up with zeros; those that are not given are those they replace */
    real *key_panels;       /* of logits */
    real *tables;           /* (tables * n, pitch) */
    real *table_panels, *scores; /* (contents, N, tables * n), dot products with embeddings */
    real *gates, *positions; /* (blocks, entries, BLOCK); positions are sums of gates without a limit */
    real *signatures;       /* (blocks, contents * entries, BLOCK), along rows before columns */
    real *line, *line_panels; /* of dot products between the patches of a line */
    real *logits;
    real *mixed;            /* (rows, pitch) */
    real *grads[INPUTS];    /* like inputs */
    real *value_panels, *grad_output;
    real *totals;           /* (T) of weights times their gradients */
    real *grad_logits[2], *inverse[2]; /* of a tile and of that on the other side of the diagonal */
    real *grad_signatures, *grad_scores, *grad_tables;
    real *highest, *sums;   /* (T), of the call */
} head_memory;

typedef struct {
    real *start;            /* or NULL to find out how much is needed */
    int64_t used;
} room;

INLINE real *take(room *in, int64_t size)
{
    real *taken = in->start ? in->start + in->used : NULL;
    in->used += whole(size, BLOCK);
    return taken;
}

/* The largest number of tokens on a side of a tile. */
INLINE int64_t side_of_tile(const call *of) { return least(of->prefix + whole(of->tile, BLOCK), tokens_of(of)); }

INLINE int64_t rows_at_once(const call *of)
{
    return most(of->logits_at_once / tokens_of(of) / BLOCK, 1) * BLOCK;
}

/* Lay out the memory of a thread. */
static head_memory lay_out(const call *of, int backward, room *in)
{
    const int64_t tokens = tokens_of(of), patches = patches_of(of), pitch = whole(of->head_dim, LANES);
    const int64_t line = most(of->height, of->width), side = backward ? side_of_tile(of) : tokens;
    const int64_t panels = (whole(side, BLOCK) + whole(tokens - side, BLOCK)) * of->head_dim;
    const int64_t embeddings = tables_of(of) * of->positions, scores = contents_of(of) * patches * embeddings;
    const int64_t entries = whole(patches, BLOCK) * entries_of(of);
    head_memory at = {.of = of, .tokens = tokens, .patches = patches, .pitch = pitch};
    for (int i = 0; i < INPUTS; i++) {
        const int replaced = i == GATE_KEY || i == LOGIT_KEY ? KEY : QUERY;
        const int given = i <= VALUE || (i == GATE_KEY ? of->gates == OTHER_GATES : of->rotated);
        at.inputs[i] = given ? take(in, tokens * pitch) : at.inputs[replaced];
        if (backward) at.grads[i] = given ? take(in, tokens * pitch) : at.grads[replaced];
    }
    at.key_panels = take(in, panels);
    at.tables = take(in, embeddings * pitch), at.table_panels = take(in, whole(embeddings, BLOCK) * of->head_dim);
    at.scores = take(in, scores);
    at.gates = take(in, entries), at.positions = take(in, entries);
    at.signatures = take(in, contents_of(of) * entries);
    at.line = take(in, line * whole(line, LANES)), at.line_panels = take(in, whole(line, BLOCK) * of->head_dim);
    if (!backward) {
        const int64_t rows = least(of->prefix + rows_at_once(of), tokens);
        at.logits = take(in, rows * tokens), at.mixed = take(in, rows * pitch);
        return at;
    }
    at.value_panels = take(in, panels), at.grad_output = take(in, tokens * pitch), at.totals = take(in, tokens);
    at.logits = take(in, side * side);
    for (int i = 0; i < (side < tokens ? 2 : 1); i++) {
        at.grad_logits[i] = take(in, side * side);
        at.inverse[i] = take(in, slots_of(of) * side * side);
    }
    at.grad_signatures = take(in, contents_of(of) * entries);
    at.grad_scores = take(in, scores), at.grad_tables = take(in, embeddings * pitch);
    return at;
}

/* Numbers that each thread needs. */
int64_t sape2_memory(const call *of, int64_t backward)
{
    room needed = {NULL, 0};
    lay_out(of, (int)backward, &needed);
    return needed.used;
}

INLINE real *entry_of(const view *of, const call *in, int64_t head)
{
    return of->data + head / in->heads * of->image + head % in->heads * of->head;
}

/* Copy rows, filled up with zeros. */
static void read_rows(const real *from, int64_t step, int64_t rows, int64_t columns, int64_t pitch, real *to)
{
    for (int64_t i = 0; i < rows; i++, from += step, to += pitch) {
        memcpy(to, from, sizeof(real) * columns);
        for (int64_t c = columns; c < pitch; c++) to[c] = 0;
    }
}

static void write_rows(const real *from, int64_t pitch, int64_t rows, int64_t columns, real *to, int64_t step)
{
    for (int64_t i = 0; i < rows; i++, from += pitch, to += step) memcpy(to, from, sizeof(real) * columns);
}

/* Signatures ------------------------------------------------------------------------------------------------------- */

/* Patches on a line: the first of line number `line` along an axis, and the step from each to the next. */
INLINE int64_t start_of(const call *of, int axis, int64_t line) { return axis ? line : line * of->width; }
INLINE int64_t step_on(const call *of, int axis) { return axis ? of->width : 1; }

/* Where entry 0 of a patch is, of `entries` in a block from number `first` on. */
INLINE real *entries_in(real *blocks, int64_t entries, int64_t first, int64_t patch)
{
    return blocks + (patch / BLOCK * entries + first) * BLOCK + patch % BLOCK;
}

/* Dot products of queries and gate keys between the patches of every line, as entries of gates. */
static void gate_products(const head_memory *at)
{
    const call *of = at->of;
    for (int64_t axis = 0, first = 0; axis < AXES; axis++) {
        const int64_t length = length_of(of, axis), step = step_on(of, axis), row = step * at->pitch;
        const int64_t pitch = whole(length, LANES);
        for (int64_t line = 0; line < at->patches / length && of->axes[axis]; line++) {
            const int64_t start = start_of(of, axis, line), offset = (of->prefix + start) * at->pitch;
            transpose_to_panels(at->inputs[GATE_KEY] + offset, row, length, of->head_dim, at->line_panels);
            multiply(at->inputs[QUERY] + offset, row, 1, at->line_panels, BLOCK, BLOCK * of->head_dim, length, pitch,
                     of->head_dim, at->line, pitch, 0);
            for (int64_t x = 0; x < length; x++) {
                real *entry = entries_in(at->gates, entries_of(of), first, start + x * step);
                for (int64_t t = 0; t < length; t++) entry[t * BLOCK] = at->line[x * pitch + t];
            }
        }
        first += of->axes[axis] * length;
    }
}

/* Add to the gradients of queries and gate keys, given those of their dot products. */
static void gate_products_backward(const head_memory *at)
{
    const call *of = at->of;
    for (int64_t axis = 0, first = 0; axis < AXES; axis++) {
        const int64_t length = length_of(of, axis), step = step_on(of, axis), row = step * at->pitch;
        for (int64_t line = 0; line < at->patches / length && of->axes[axis]; line++) {
            const int64_t start = start_of(of, axis, line), offset = (of->prefix + start) * at->pitch;
            for (int64_t x = 0; x < length; x++) {
                const real *entry = entries_in(at->gates, entries_of(of), first, start + x * step);
                for (int64_t t = 0; t < length; t++) at->line[x * length + t] = entry[t * BLOCK];
            }
            multiply(at->line, length, 1, at->inputs[GATE_KEY] + offset, row, BLOCK, length, at->pitch, length,
                     at->grads[QUERY] + offset, row, 1);
            multiply(at->line, 1, length, at->inputs[QUERY] + offset, row, BLOCK, length, at->pitch, length,
                     at->grads[GATE_KEY] + offset, row, 1);
        }
        first += of->axes[axis] * length;
    }
}

/* Where positions of LANES patches lie: the embedding below, and what part of the way to the next. */
INLINE vec below(vec position, int64_t last, int32_t *lower)
{
    position = either(position > (real)last, all(last), position);
    const vec inside = either(position < (real)(last - 1), position, all(last - 1)); /* NaN has no place, but stays NaN */
    vec rounded;
    for (int l = 0; l < LANES; l++) lower[l] = (int32_t)inside[l];
    for (int l = 0; l < LANES; l++) rounded[l] = lower[l];
    return position - rounded;
}

/* Gates of a block along an axis from dot products, and the sums of gates from an entry to the end of the line. */
INLINE void soft_positions(const call *of, int64_t length, real *gates, real *positions)
{
    vec sum0 = {0}, sum1 = {0};
    for (int64_t t = length - 1; t >= 0; t--) {
        const int64_t at = t * BLOCK;
        const vec gate0 = of->gates == UNIT_GATES ? all(1) : sigmoid((real)of->scale * load(gates + at));
        const vec gate1 = of->gates == UNIT_GATES ? all(1) : sigmoid((real)of->scale * load(gates + at + LANES));
        sum0 += gate0, sum1 += gate1;
        store(gates + at, gate0), store(gates + at + LANES, gate1);
        store(positions + at, sum0), store(positions + at + LANES, sum1);
    }
}

static void write_signatures(const head_memory *at)
{
    const call *of = at->of;
    const int64_t last = of->positions - 1, embeddings = tables_of(of) * of->positions;
    const int64_t entries = contents_of(of) * entries_of(of);
    real *gates = at->gates, *positions = at->positions, *entry = at->signatures;
    for (int content = 0, number = 0; content < 2; content++)
        if (of->contents[content])
            multiply(at->inputs[content ? KEY : QUERY] + of->prefix * at->pitch, at->pitch, 1, at->table_panels, BLOCK,
                     BLOCK * of->head_dim, at->patches, embeddings, of->head_dim,
                     at->scores + number++ * at->patches * embeddings, embeddings, 0);
    if (of->gates != UNIT_GATES) gate_products(at);
    for (int64_t patch = 0; patch < at->patches; patch += BLOCK)
        for (int axis = 0, table = 0; axis < AXES; axis++) {
            if (!of->axes[axis]) continue;
            const int64_t length = length_of(of, axis);
            soft_positions(of, length, gates, positions);
            for (int64_t content = 0; content < contents_of(of); content++) {
                const real *scores = at->scores + (content * at->patches + patch) * embeddings + table * of->positions;
                for (int64_t t = 0; t < length; t++, entry += BLOCK)
                    for (int half = 0; half < BLOCK; half += LANES) {
                        const int64_t lanes = least(LANES, at->patches - patch - half);
                        int32_t lower[LANES];
                        vec at_lower = {0}, at_upper = {0};
                        const vec part = below(load(positions + t * BLOCK + half), last, lower);
                        for (int l = 0; l < lanes; l++) {
                            const real *score = scores + (half + l) * embeddings + lower[l];
                            at_lower[l] = score[0], at_upper[l] = score[1];
                        }
                        store(entry + half, at_lower + part * (at_upper - at_lower));
                    }
            }
            gates += length * BLOCK, positions += length * BLOCK, table++;
        }
    if (of->direct) return;
    /* Around their mean signatures have the same distances, and sums over them cancel less. */
    for (int64_t e = 0; e < entries; e++) {
        vec sum = {0};
        for (int64_t patch = 0; patch < at->patches; patch += LANES)
            sum += load_some(entries_in(at->signatures, entries, e, patch), at->patches - patch, 0);
        const real mean = sum_of(sum) / at->patches;
        for (int64_t patch = 0; patch < at->patches; patch += LANES) {
            real *to = entries_in(at->signatures, entries, e, patch);
            store(to, load(to) - mean);
        }
    }
}

/* Add what signatures have to do with the gradients of queries, keys and tables; gates become their gradients. */
static void signatures_backward(const head_memory *at)
{
    const call *of = at->of;
    const int64_t last = of->positions - 1, embeddings = tables_of(of) * of->positions;
    real *gates = at->gates, *positions = at->positions, *grads = at->grad_signatures;
    memset(at->grad_scores, 0, sizeof(real) * contents_of(of) * at->patches * embeddings);
    for (int64_t patch = 0; patch < at->patches; patch += BLOCK)
        for (int axis = 0, table = 0; axis < AXES; axis++) {
            if (!of->axes[axis]) continue;
            const int64_t length = length_of(of, axis);
            for (int64_t content = 0; content < contents_of(of); content++) {
                const int64_t first = (content * at->patches + patch) * embeddings + table * of->positions;
                for (int64_t t = 0; t < length; t++)
                    for (int half = 0; half < BLOCK; half += LANES) {
                        real *to = grads + t * BLOCK + half;
                        const int64_t lanes = least(LANES, at->patches - patch - half);
                        const vec position = load(positions + t * BLOCK + half);
                        const vec grad = load(grads + (content * length + t) * BLOCK + half);
                        int32_t lower[LANES];
                        vec slope = {0};
                        const vec part = below(position, last, lower), at_upper = part * grad, at_lower = grad - at_upper;
                        for (int l = 0; l < lanes; l++) {
                            const int64_t score = first + (half + l) * embeddings + lower[l];
                            slope[l] = at->scores[score + 1] - at->scores[score];
                            at->grad_scores[score] += at_lower[l];
                            at->grad_scores[score + 1] += at_upper[l];
                        }
                        const vec of_position = either(position > (real)last, (vec){0}, grad * slope);
                        store(to, content == 0 ? of_position : load(to) + of_position);
                    }
            }
            vec sum0 = {0}, sum1 = {0};
            for (int64_t t = 0; t < length * BLOCK; t += BLOCK) {
                const vec gate0 = load(gates + t), gate1 = load(gates + t + LANES);
                sum0 += load(grads + t), sum1 += load(grads + t + LANES);
                store(gates + t, sum0 * ((real)of->scale * gate0 * (1 - gate0)));
                store(gates + t + LANES, sum1 * ((real)of->scale * gate1 * (1 - gate1)));
            }
            grads += contents_of(of) * length * BLOCK, gates += length * BLOCK, positions += length * BLOCK, table++;
        }
    if (of->gates != UNIT_GATES) gate_products_backward(at);
    for (int content = 0, number = 0; content < 2; content++) {
        if (!of->contents[content]) continue;
        const real *grad_scores = at->grad_scores + number * at->patches * embeddings;
        const int64_t input = content ? KEY : QUERY, offset = of->prefix * at->pitch;
        multiply(grad_scores, embeddings, 1, at->tables, at->pitch, BLOCK, at->patches, at->pitch, embeddings,
                 at->grads[input] + offset, at->pitch, 1);
        multiply(grad_scores, 1, embeddings, at->inputs[input] + offset, at->pitch, BLOCK, embeddings, at->pitch,
                 at->patches, at->grad_tables, at->pitch, number++);
    }
}

/* Attention weights ------------------------------------------------------------------------------------------------ */

/* Tokens row to row_end as queries, column to column_end as keys; both begin with token 0 or at a block. */
typedef struct {
    int64_t row, row_end, column, column_end;
} tile;

/* Squared distances of four patches at `own` to BLOCK patches at `other`. */
INLINE void distances(const real *own, const real *other, int64_t length, vec found[8])
{
    vec a0 = {0}, a1 = {0}, b0 = {0}, b1 = {0}, c0 = {0}, c1 = {0}, d0 = {0}, d1 = {0};
#pragma GCC unroll 2
    for (int64_t t = 0; t < length; t++, own += BLOCK, other += BLOCK) {
        const vec first = load(other), second = load(other + LANES);
        vec x = first - own[0], y = second - own[0];
        a0 += x * x, a1 += y * y;
        x = first - own[1], y = second - own[1];
        b0 += x * x, b1 += y * y;
        x = first - own[2], y = second - own[2];
        c0 += x * x, c1 += y * y;
        x = first - own[3], y = second - own[3];
        d0 += x * x, d1 += y * y;
    }
    found[0] = a0, found[1] = a1, found[2] = b0, found[3] = b1, found[4] = c0, found[5] = c1, found[6] = d0, found[7] = d1;
}

/* Four rows of patches and BLOCK columns, or fewer; all that is constant in a call is known to the compiler. */
INLINE void bias_block(const int normalize, const int full, const call *of, const real *own, const real *other,
                       int64_t rows, int64_t left, real *logits, int64_t columns, real *inverse, int64_t others,
                       int64_t inverse_pitch, vec *top, const real *limits, const real *factors)
{
    vec bias[8] = {{0}}, found[8];
    for (int axis = 0; axis < AXES; axis++)
        for (int64_t slot = 0; slot < slots_along(of, axis); slot++) {
            const int64_t length = length_of(of, axis);
            distances(own, other, length, found);
            own += length * BLOCK, other += length * BLOCK;
            for (int k = 0; k < 8; k++) {
                const vec x = inverse_root(found[k]);
                bias[k] += found[k] * x;
                if (normalize) continue;
                real *to = inverse + k / 2 * others + k % 2 * LANES;
                if (full) store(to, x);
                else if (k / 2 < rows) store_some(to, x, left - k % 2 * LANES);
            }
            if (!normalize) inverse += inverse_pitch;
        }
    for (int k = 0; k < 8; k++) {
        const int r = k / 2;
        const int64_t lanes = full ? LANES : left - k % 2 * LANES;
        if (!full && (r >= rows || lanes <= 0)) continue;
        real *to = logits + r * columns + k % 2 * LANES;
        vec x = (real)of->scale * (full ? load(to) : load_some(to, lanes, -INFINITY)) + bias[k];
        if (normalize) top[r] = either(x > top[r], x, top[r]);
        else x = exponential(x - limits[r]) * factors[r];
        if (full) store(to, x);
        else store_some(to, x, lanes);
    }
}

/* A number for each of ROWS rows: what a column has, or what is known of a row. */
typedef struct {
    real row[ROWS];
} column;

INLINE column read_column(const real *from, int64_t columns, int64_t rows)
{
    column x;
    for (int r = 0; r < ROWS; r++) x.row[r] = r < rows ? from[r * columns] : 0;
    return x;
}

INLINE void write_column(const column *x, real *to, int64_t columns, int64_t rows)
{
    for (int64_t r = 0; r < rows; r++) to[r * columns] = x->row[r];
}

/* e^(scale * x - highest) * factor */
INLINE column weights_of(column x, real scale, const column *highest, const column *factors)
{
    for (int r = 0; r < ROWS; r += LANES)
        store(x.row + r, exponential(scale * load(x.row + r) - load(highest->row + r)) * load(factors->row + r));
    return x;
}

/* Turn dot products into attention weights, in rows of which none or all are prefix tokens. To normalize is to find the
 * highest logits and the sums of weights, by which these are not divided; else these are known, and inverse distances are
 * written, (slots, rows, columns) of patches, 0 for 0. */
INLINE void weigh_rows(const int normalize, const head_memory *at, tile in, int64_t row, int64_t rows, real *inverse)
{
    const call *of = at->of;
    const real scale = of->scale;
    const int64_t columns = in.column_end - in.column, row_prefix = most(of->prefix - in.row, 0);
    const int64_t prefix = least(most(of->prefix - in.column, 0), columns), others = columns - prefix;
    const int64_t inverse_pitch = (in.row_end - in.row - row_prefix) * others;
    const int64_t plain = row < row_prefix ? columns : prefix; /* columns without a bias */
    real *logits = at->logits + row * columns, *known_highest = at->highest + in.row + row, *known_sums = at->sums + in.row + row;
    vec top[ROWS];
    column highest, factors;
    for (int r = 0; r < ROWS; r++) {
        top[r] = all(-INFINITY);
        highest.row[r] = normalize || r >= rows ? -INFINITY : known_highest[r];
        factors.row[r] = normalize || r >= rows ? 1 : 1 / known_sums[r];
    }
    for (int64_t c = 0; c < plain; c++) {
        column x = read_column(logits + c, columns, rows);
        if (normalize)
            for (int r = 0; r < ROWS; r++) {
                x.row[r] *= scale;
                highest.row[r] = x.row[r] > highest.row[r] ? x.row[r] : highest.row[r];
            }
        else x = weights_of(x, scale, &highest, &factors);
        write_column(&x, logits + c, columns, rows);
    }
    if (plain < columns) {
        const int64_t entries = contents_of(of) * entries_of(of), first = in.row + row - of->prefix;
        const real *other = entries_in(at->signatures, entries, 0, in.column + prefix - of->prefix);
        if (!normalize) inverse += (row - row_prefix) * others;
        for (int64_t j = 0; j < others; j += BLOCK, other += entries * BLOCK)
            for (int64_t r = 0; r < rows; r += 4) {
                const real *own = entries_in(at->signatures, entries, 0, first + r);
                real *pairs = logits + r * columns + prefix + j, *to = normalize ? NULL : inverse + r * others + j;
                if (r + 4 <= rows && j + BLOCK <= others)
                    bias_block(normalize, 1, of, own, other, 4, BLOCK, pairs, columns, to, others, inverse_pitch, top + r,
                               highest.row + r, factors.row + r);
                else
                    bias_block(normalize, 0, of, own, other, rows - r, others - j, pairs, columns, to, others,
                               inverse_pitch, top + r, highest.row + r, factors.row + r);
            }
    }
    if (!normalize) return;
    vec parts[ROWS];
    column sums = {{0}};
    const int64_t in_vectors = columns / LANES * LANES;
    for (int l = 0; l < LANES; l++)
        for (int r = 0; r < ROWS; r++)
            highest.row[r] = top[r][l] > highest.row[r] ? top[r][l] : highest.row[r];
    for (int64_t r = 0; r < rows; r++) {
        const real limit = highest.row[r];
        real *to = logits + r * columns;
        vec sum = {0};
        for (int64_t j = 0; j < in_vectors; j += LANES) {
            const vec x = exponential(load(to + j) - limit);
            store(to + j, x);
            sum += x;
        }
        parts[r] = sum;
    }
    for (int64_t c = in_vectors; c < columns; c++) {
        column x = read_column(logits + c, columns, rows);
        x = weights_of(x, 1, &highest, &factors);
        write_column(&x, logits + c, columns, rows);
        for (int r = 0; r < ROWS; r++) sums.row[r] += x.row[r];
    }
    for (int l = 0; l < LANES; l++)
        for (int64_t r = 0; r < rows; r++) sums.row[r] += parts[r][l];
    memcpy(known_highest, highest.row, sizeof(real) * rows);
    memcpy(known_sums, sums.row, sizeof(real) * rows);
}

INLINE void weigh(const int normalize, const head_memory *at, tile in, real *inverse)
{
    const int64_t rows = in.row_end - in.row, prefix = least(most(at->of->prefix - in.row, 0), rows);
    for (int64_t row = 0; row < prefix; row += ROWS) weigh_rows(normalize, at, in, row, least(ROWS, prefix - row), inverse);
    for (int64_t row = prefix; row < rows; row += ROWS) weigh_rows(normalize, at, in, row, least(ROWS, rows - row), inverse);
}

/* Patches that are columns of a tile, and how many prefix tokens come before them. */
typedef struct {
    int64_t first, end, before;
} column_patches;

INLINE column_patches patches_in_columns(const call *of, tile in)
{
    const int64_t before = least(most(of->prefix - in.column, 0), in.column_end - in.column);
    return (column_patches){in.column + before - of->prefix, in.column_end - of->prefix, before};
}

/* Add the direct bias to dot products. */
static void add_readings(const head_memory *at, tile in)
{
    const call *of = at->of;
    const column_patches others = patches_in_columns(of, in);
    const real factor = 1 / (real)of->scale;
    for (int64_t row = most(in.row, of->prefix); row < in.row_end; row++) {
        const real *read = entries_in(at->signatures, entries_of(of), 0, row - of->prefix);
        real *to = at->logits + (row - in.row) * (in.column_end - in.column) + others.before;
        for (int64_t c = 0; c < of->width; c++) at->line[c] = factor * read[c * BLOCK];
        for (int64_t j = others.first, next; j < others.end; to += next - j, j = next) {
            next = least((j / of->width + 1) * of->width, others.end);
            const real of_row = factor * read[(of->width + j / of->width) * BLOCK], *of_columns = at->line + j % of->width;
            for (int64_t k = 0; k < next - j; k++) to[k] += of_columns[k] + of_row;
        }
    }
}

/* Gradient of what is read, from that of dot products. */
static void readings_backward(const head_memory *at, tile in, const real *grad)
{
    const call *of = at->of;
    const column_patches others = patches_in_columns(of, in);
    const real factor = 1 / (real)of->scale;
    for (int64_t row = most(in.row, of->prefix); row < in.row_end; row++) {
        const real *from = grad + (row - in.row) * (in.column_end - in.column) + others.before;
        real *to = entries_in(at->grad_signatures, entries_of(of), 0, row - of->prefix);
        memset(at->line, 0, sizeof(real) * of->width);
        for (int64_t j = others.first, next; j < others.end; from += next - j, j = next) {
            next = least((j / of->width + 1) * of->width, others.end);
            real of_row = 0, *of_columns = at->line + j % of->width;
            for (int64_t k = 0; k < next - j; k++) of_row += from[k], of_columns[k] += from[k];
            to[(of->width + j / of->width) * BLOCK] += factor * of_row;
        }
        for (int64_t c = 0; c < of->width; c++) to[c * BLOCK] += factor * at->line[c];
    }
}

/* Panels of tokens of an input, from token 0 to `side` and from there on, so that tiles begin with a panel. */
static void make_panels(const head_memory *at, const real *input, int64_t side, real *panels)
{
    const int64_t dim = at->of->head_dim;
    transpose_to_panels(input, at->pitch, side, dim, panels);
    transpose_to_panels(input + side * at->pitch, at->pitch, at->tokens - side, dim, panels + whole(side, BLOCK) * dim);
}

/* The panels from the beginning of a tile on. */
INLINE const real *panels_from(const head_memory *at, const real *panels, int64_t side, int64_t token)
{
    return panels + (token ? whole(side, BLOCK) + token - side : 0) * at->of->head_dim;
}

/* Write dot products of tokens of a tile, of which the columns are in panels. */
static void dot_products(const head_memory *at, tile in, const real *rows, const real *panels, int64_t side, real *to)
{
    const int64_t dim = at->of->head_dim, columns = in.column_end - in.column;
    multiply(rows + in.row * at->pitch, at->pitch, 1, panels_from(at, panels, side, in.column), BLOCK, BLOCK * dim,
             in.row_end - in.row, columns, dim, to, columns, 0);
}

/* Read what forward and backward pass need, and compute signatures. */
static head_memory prepare(const call *of, int64_t head, int backward, real *memory)
{
    room in = {memory, 0};
    head_memory at = lay_out(of, backward, &in);
    const int64_t embeddings = tables_of(of) * of->positions;
    at.highest = of->highest + head * at.tokens, at.sums = of->sums + head * at.tokens;
    for (int i = 0; i < INPUTS; i++)
        if (of->inputs[i].data)
            read_rows(entry_of(of->inputs + i, of, head), of->inputs[i].token, at.tokens, of->head_dim, at.pitch, at.inputs[i]);
    read_rows(of->tables, of->head_dim, embeddings, of->head_dim, at.pitch, at.tables);
    transpose_to_panels(at.tables, at.pitch, embeddings, of->head_dim, at.table_panels);
    make_panels(&at, at.inputs[LOGIT_KEY], backward ? side_of_tile(of) : at.tokens, at.key_panels);
    write_signatures(&at);
    return at;
}

static void forward_head(const call *of, int64_t head, real *memory)
{
    const head_memory at = prepare(of, head, 0, memory);
    real *to = entry_of(&of->output, of, head);
    tile in = {0, least(of->prefix + rows_at_once(of), at.tokens), 0, at.tokens};
    for (; in.row < at.tokens; in.row = in.row_end, in.row_end = least(in.row + rows_at_once(of), at.tokens)) {
        const int64_t rows = in.row_end - in.row;
        dot_products(&at, in, at.inputs[LOGIT_QUERY], at.key_panels, at.tokens, at.logits);
        if (of->direct) add_readings(&at, in);
        weigh(1, &at, in, NULL);
        multiply(at.logits, at.tokens, 1, at.inputs[VALUE], at.pitch, BLOCK, rows, at.pitch, at.tokens, at.mixed, at.pitch, 0);
        for (int64_t r = 0; r < rows; r++, to += of->output.token) {
            const real factor = 1 / at.sums[in.row + r];
            for (int64_t c = 0; c < of->head_dim; c++) to[c] = factor * at.mixed[r * at.pitch + c];
        }
    }
}

void sape2_forward(const call *of) { share(forward_head, of, sape2_memory(of, 0)); }

/* Gradients -------------------------------------------------------------------------------------------------------- */

/* From the gradient of weights to that of dot products. */
static void softmax_backward(const head_memory *at, tile in, real *grad)
{
    const int64_t columns = in.column_end - in.column, in_vectors = columns / LANES * LANES;
    const real scale = at->of->scale, *weights = at->logits;
    for (int64_t row = in.row; row < in.row_end; row++, weights += columns, grad += columns) {
        const real total = at->totals[row];
        for (int64_t j = 0; j < in_vectors; j += LANES)
            store(grad + j, load(weights + j) * (scale * (load(grad + j) - total)));
        for (int64_t j = in_vectors; j < columns; j++) grad[j] = weights[j] * (scale * (grad[j] - total));
    }
}

/* Add sums over patches j, of ratio[j] times u_own - u_j, to the gradient of `count` entries of a signature. */
INLINE void add_differences(const int count, const real *own, const real *others, int64_t number, int64_t block,
                            const vec ratio[][2], vec total0, vec total1, real factor, real *grad)
{
    vec sum[6][2] = {{{0}}};
    for (int64_t first = 0; first < number; first += BLOCK, others += block)
        for (int64_t j = 0; j < least(BLOCK, number - first); j++)
            for (int k = 0; k < count; k++) {
                const real other = others[k * BLOCK + j];
                sum[k][0] += other * ratio[first + j][0];
                sum[k][1] += other * ratio[first + j][1];
            }
    for (int k = 0; k < count; k++) {
        real *to = grad + k * BLOCK;
        store(to, load(to) + factor * (load(own + k * BLOCK) * total0 - sum[k][0]));
        store(to + LANES, load(to + LANES) + factor * (load(own + k * BLOCK + LANES) * total1 - sum[k][1]));
    }
}

/* Gradient of the signatures of BLOCK patches that are columns, or fewer, from their distances to those that are rows.
 * `grad` has the gradients of dot products (rows, columns), `mirrored` those of the tile on the other side of the
 * diagonal, (columns, rows). */
INLINE void distances_backward_block(const int full, const head_memory *at, tile in, const real *grad,
                                     const real *mirrored, const real *inverse, int64_t own, int64_t lanes)
{
    const call *of = at->of;
    const int64_t rows = in.row_end - in.row, columns = in.column_end - in.column;
    const int64_t row_prefix = most(of->prefix - in.row, 0), column_prefix = most(of->prefix - in.column, 0);
    const int64_t others = rows - row_prefix, owns = columns - column_prefix;
    const int64_t entries = contents_of(of) * entries_of(of), own_patch = in.column + column_prefix - of->prefix + own;
    const int64_t lanes0 = full ? LANES : lanes, lanes1 = full ? LANES : lanes - LANES;
    const real factor = 1 / (real)of->scale;
    grad += row_prefix * columns + column_prefix + own;
    mirrored += (column_prefix + own) * rows + row_prefix;
    for (int64_t first = 0; first < others; first += OTHERS) {
        const int64_t number = least(OTHERS, others - first), other_patch = in.row + row_prefix - of->prefix + first;
        const real *its = entries_in(at->signatures, entries, 0, own_patch);
        const real *theirs = entries_in(at->signatures, entries, 0, other_patch);
        const real *of_slot = inverse + first * owns + own;
        real *to = entries_in(at->grad_signatures, entries, 0, own_patch);
        vec both[OTHERS][2], ratio[OTHERS][2];
        if (!full) memset(both, 0, sizeof both);
        for (int64_t l = 0; l < (full ? BLOCK : lanes); l++)
            for (int64_t j = 0; j < number; j++) ((real *)both)[j * BLOCK + l] = mirrored[l * rows + first + j];
        for (int64_t j = 0; j < number; j++) {
            const real *from = grad + (first + j) * columns;
            both[j][0] += load_some(from, lanes0, 0);
            if (lanes1 > 0) both[j][1] += load_some(from + LANES, lanes1, 0);
        }
        for (int axis = 0; axis < AXES; axis++)
            for (int64_t slot = 0; slot < slots_along(of, axis); slot++, of_slot += others * owns) {
                vec total0 = {0}, total1 = {0};
                for (int64_t j = 0; j < number; j++) {
                    const vec x = both[j][0] * load_some(of_slot + j * owns, lanes0, 0);
                    const vec y = lanes1 > 0 ? both[j][1] * load_some(of_slot + j * owns + LANES, lanes1, 0) : (vec){0};
                    ratio[j][0] = x, ratio[j][1] = y;
                    total0 += x, total1 += y;
                }
                int64_t left = length_of(of, axis);
#define STEP(count)                                                                                                    \
    for (; left >= count; left -= count, its += count * BLOCK, theirs += count * BLOCK, to += count * BLOCK)           \
    add_differences(count, its, theirs, number, entries * BLOCK, ratio, total0, total1, factor, to)
                STEP(6);
                STEP(4);
                STEP(2);
                STEP(1);
#undef STEP
            }
    }
}

static void distances_backward(const head_memory *at, tile in, const real *grad, const real *mirrored, const real *inverse)
{
    const int64_t owns = in.column_end - most(in.column, at->of->prefix);
    int64_t own = 0;
    for (; own + BLOCK <= owns; own += BLOCK) distances_backward_block(1, at, in, grad, mirrored, inverse, own, BLOCK);
    if (own < owns) distances_backward_block(0, at, in, grad, mirrored, inverse, own, owns - own);
}

/* A tile, and the one on the other side of the diagonal, whose pairs of patches have the same distances. */
static void tiles_backward(const head_memory *at, tile in)
{
    const int64_t side = side_of_tile(at->of), pitch = at->pitch, number = in.row == in.column ? 1 : 2;
    const tile pair[2] = {in, {in.column, in.column_end, in.row, in.row_end}};
    for (int i = 0; i < number; i++) {
        const int64_t row = pair[i].row, rows = pair[i].row_end - row, column = pair[i].column;
        const int64_t columns = pair[i].column_end - column;
        dot_products(at, pair[i], at->inputs[LOGIT_QUERY], at->key_panels, side, at->logits);
        if (at->of->direct) add_readings(at, pair[i]);
        weigh(0, at, pair[i], at->inverse[i]);
        multiply(at->logits, 1, columns, at->grad_output + row * pitch, pitch, BLOCK, columns, pitch, rows,
                 at->grads[VALUE] + column * pitch, pitch, 1);
        dot_products(at, pair[i], at->grad_output, at->value_panels, side, at->grad_logits[i]);
        softmax_backward(at, pair[i], at->grad_logits[i]);
    }
    for (int i = 0; i < number; i++) {
        const int64_t row = pair[i].row, rows = pair[i].row_end - row, column = pair[i].column;
        const int64_t columns = pair[i].column_end - column;
        const real *grad = at->grad_logits[i];
        if (at->of->direct) readings_backward(at, pair[i], grad);
        else distances_backward(at, pair[i], grad, at->grad_logits[number - 1 - i], at->inverse[i]);
        multiply(grad, columns, 1, at->inputs[LOGIT_KEY] + column * pitch, pitch, BLOCK, rows, pitch, columns,
                 at->grads[LOGIT_QUERY] + row * pitch, pitch, 1);
        multiply(grad, 1, columns, at->inputs[LOGIT_QUERY] + row * pitch, pitch, BLOCK, columns, pitch, rows,
                 at->grads[LOGIT_KEY] + column * pitch, pitch, 1);
    }
}

static void backward_head(const call *of, int64_t head, real *memory)
{
    const head_memory at = prepare(of, head, 1, memory);
    const int64_t side = side_of_tile(of), step = whole(of->tile, BLOCK), dim = of->head_dim;
    const int64_t embeddings = tables_of(of) * of->positions;
    const real *output = entry_of(&of->output, of, head);
    read_rows(entry_of(&of->grad_output, of, head), of->grad_output.token, at.tokens, dim, at.pitch, at.grad_output);
    make_panels(&at, at.inputs[VALUE], side, at.value_panels);
    for (int64_t i = 0; i < at.tokens; i++, output += of->output.token) {
        at.totals[i] = 0;
        for (int64_t c = 0; c < dim; c++) at.totals[i] += at.grad_output[i * at.pitch + c] * output[c];
    }
    for (int i = 0; i < INPUTS; i++)
        if (of->grads[i].data) memset(at.grads[i], 0, sizeof(real) * at.tokens * at.pitch);
    memset(at.grad_signatures, 0, sizeof(real) * contents_of(of) * entries_of(of) * whole(at.patches, BLOCK));
    for (int64_t row = 0, row_end = side; row < at.tokens; row = row_end, row_end = least(row + step, at.tokens))
        for (int64_t column = row, end = row_end; column < at.tokens;
             column = end, end = least(column + step, at.tokens))
            tiles_backward(&at, (tile){row, row_end, column, end});
    signatures_backward(&at);
    for (int i = 0; i < INPUTS; i++)
        if (of->grads[i].data)
            write_rows(at.grads[i], at.pitch, at.tokens, dim, entry_of(of->grads + i, of, head), of->grads[i].token);
    write_rows(at.grad_tables, at.pitch, embeddings, dim, of->grad_tables + head * embeddings * dim, dim);
}

void sape2_backward(const call *of) { share(backward_head, of, sape2_memory(of, 1)); }

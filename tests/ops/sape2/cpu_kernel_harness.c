/* Runs forward and backward of cpu_kernel.c on many shapes, in memory of exactly the size that they may touch, for
 * sanitizers. Memory that is only written to is full of NaN before. Ends with 0 if all results are finite. */
#include CPU_KERNEL
#include <stdio.h>
#include <stdlib.h>

enum { IMAGES = 2, HEADS = 2, DIM = 5, POSITIONS = 4 };

static uint64_t state = 1;

static real *array(int64_t size, real scale)
{
    real *made = malloc(sizeof(real) * most(size, 1));
    for (int64_t i = 0; i < size; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        made[i] = scale != scale ? scale : scale * ((real)(state >> 40) / (1 << 23) - 1);
    }
    return made;
}

static int check(const char *what, const real *x, int64_t size)
{
    for (int64_t i = 0; i < size; i++)
        if (!isfinite(x[i])) {
            printf("%s is not finite at %ld of %ld\n", what, (long)i, (long)size);
            return 1;
        }
    return 0;
}

/* A tensor (IMAGES, HEADS, tokens, DIM), laid out as (IMAGES, tokens, HEADS, DIM). */
static view tensor(int64_t tokens, real scale)
{
    return (view){array(IMAGES * HEADS * tokens * DIM, scale), HEADS * tokens * DIM, DIM, HEADS * DIM};
}

static int run(int64_t prefix, int64_t height, int64_t width, int axes, int contents, int gates, int rotated, int64_t tile,
               int64_t threads)
{
    const int64_t tokens = prefix + height * width, rows = IMAGES * HEADS * tokens;
    call of = {.images = IMAGES, .heads = HEADS, .prefix = prefix, .height = height, .width = width, .head_dim = DIM,
               .positions = POSITIONS, .axes = {axes != 2, axes != 1}, .contents = {contents > 0, contents % 2 == 0},
               .direct = contents == 3,
               .gates = gates, .rotated = rotated, .logits_at_once = tile * tile, .tile = tile, .threads = threads,
               .scale = 0.4};
    const int64_t size_of_tables = tables_of(&of) * POSITIONS * DIM;
    for (int i = 0; i < INPUTS; i++)
        if (i <= VALUE || (i == GATE_KEY ? gates == OTHER_GATES : rotated))
            of.inputs[i] = tensor(tokens, 1), of.grads[i] = tensor(tokens, NAN);
    of.tables = array(size_of_tables, 1), of.grad_tables = array(IMAGES * HEADS * size_of_tables, NAN);
    of.output = tensor(tokens, NAN), of.grad_output = tensor(tokens, 1);
    of.highest = array(rows, NAN), of.sums = array(rows, NAN);

    of.memory = array(threads * sape2_memory(&of, 0), NAN);
    sape2_forward(&of);
    free(of.memory);
    int failed = check("output", of.output.data, rows * DIM) | check("highest", of.highest, rows);
    failed |= check("sums", of.sums, rows);

    of.memory = array(threads * sape2_memory(&of, 1), NAN);
    sape2_backward(&of);
    free(of.memory);
    failed |= check("gradient of tables", of.grad_tables, IMAGES * HEADS * size_of_tables);
    for (int i = 0; i < INPUTS; i++)
        if (of.grads[i].data) {
            failed |= check("gradient of an input", of.grads[i].data, rows * DIM);
            free(of.inputs[i].data), free(of.grads[i].data);
        }
    free(of.tables), free(of.grad_tables), free(of.output.data), free(of.grad_output.data);
    free(of.highest), free(of.sums);
    return failed;
}

int main(void)
{
    const int64_t grids[][2] = {{1, 1}, {1, 5}, {5, 1}, {3, 4}, {8, 8}, {7, 9}, {1, 130}, {40, 2}}, prefixes[] = {0, 1, 20};
    int failed = 0;
    for (int g = 0; g < 8; g++)
        for (int p = 0; p < 3; p++)
            for (int axes = 0; axes < 3; axes++)
                for (int gates = 0; gates < 3; gates++)
                    for (int contents = 0; contents < (axes == 0 ? 4 : 3); contents++) /* 3 for a direct bias */
                        if (g < 6 || (axes + gates + contents) % 3 == p) /* the largest are slow */
                            failed |= run(prefixes[p], grids[g][0], grids[g][1], axes, contents, gates, (g + p) % 2,
                                          g % 3 ? 2 * BLOCK : 1000, 1 + 2 * (g % 2));
    return failed;
}

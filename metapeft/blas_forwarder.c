/* The three CBLAS functions that MLX calls, under their standard names, forwarded to a library that exports them under others.
   metapeft/blas.py sets the addresses before MLX is imported. Signatures: the CBLAS interface of the BLAS Technical Forum. */

#ifdef __cplusplus
extern "C" {
#endif

typedef void (*sgemm_t)(int, int, int, int, int, int, float, const float *, int, const float *, int, float, float *, int);
typedef void (*dgemm_t)(int, int, int, int, int, int, double, const double *, int, const double *, int, double, double *, int);
typedef void (*cgemm_t)(int, int, int, int, int, int, const void *, const void *, int, const void *, int, const void *, void *, int);

static sgemm_t sgemm;
static dgemm_t dgemm;
static cgemm_t cgemm;

void metapeft_forward_to(void *s, void *d, void *c) {
  sgemm = (sgemm_t)s;
  dgemm = (dgemm_t)d;
  cgemm = (cgemm_t)c;
}

void cblas_sgemm(int order, int ta, int tb, int m, int n, int k, float alpha, const float *a, int lda, const float *b, int ldb,
                 float beta, float *c, int ldc) {
  sgemm(order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

void cblas_dgemm(int order, int ta, int tb, int m, int n, int k, double alpha, const double *a, int lda, const double *b, int ldb,
                 double beta, double *c, int ldc) {
  dgemm(order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

void cblas_cgemm(int order, int ta, int tb, int m, int n, int k, const void *alpha, const void *a, int lda, const void *b, int ldb,
                 const void *beta, void *c, int ldc) {
  cgemm(order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

#ifdef __cplusplus
}
#endif

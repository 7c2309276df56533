"""Earth mover's distance between the feature maps of two images.

DeepEMD (arXiv 2003.06777, sections 3.2 to 3.4) compares a query image with a class prototype by the cheapest way to
move the mass of one feature map onto the other:

    w1_a  = relu(<q_a, mean_b s_b>) + 1e-3      w2_b = relu(<s_b, mean_a q_a>) + 1e-3     (each scaled to total P)
    S_ab  = Pearson correlation of q_a and s_b over channels
    F*    = argmin_{F >= 0} sum_ab (1 - S_ab) F_ab   with row sums w1 and column sums w2
    score = (temperature / P) sum_ab S_ab F*_ab

The plan F* is a constant in the backward pass: the gradient reaches the features through S alone, as it does in the
released code of DeepEMD and QSFormer with their OpenCV solver.

Deviations: the plan is that of entropic transport (Sinkhorn; Cuturi, arXiv 1306.0895), whose scores are too low by an
offset that shrinks with epsilon and that all classes nearly share; `solver="exact"` solves the linear programme.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy import sparse
from scipy.optimize import linprog

SOLVERS = ("sinkhorn", "exact")
_ABSORB_EVERY = 10


def pearson_similarity(
    query: Float[Array, "*B N P C"], support: Float[Array, "*B M P C"]
) -> Float[Array, "*B N M P P"]:
    """Correlation over channels, in [-1, 1], of each position of each query map with each of each support map."""

    def standardize(x):
        x = x - x.mean(-1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-16))

    return jnp.einsum("...iac,...jbc->...ijab", standardize(query), standardize(support), precision="highest")


def node_weights(
    query: Float[Array, "*B N P C"], support: Float[Array, "*B M P C"]
) -> tuple[Float[Array, "*B N M P"], Float[Array, "*B N M P"]]:
    """Mass of each position: how well it matches the mean feature of the other image. Each side sums to P."""

    def scale(affinity):
        mass = jax.nn.relu(affinity) + (1e-3 + 1e-5)  # the released code adds the second where it calls the solver
        return mass * (mass.shape[-1] / mass.sum(-1, keepdims=True))

    query_mass = jnp.einsum("...iac,...jc->...ija", query, support.mean(-2))
    support_mass = jnp.einsum("...jbc,...ic->...ijb", support, query.mean(-2))
    return scale(query_mass), scale(support_mass)


def sinkhorn_plan(
    cost: Float[Array, "*B P R"],
    row_mass: Float[Array, "*B P"],
    column_mass: Float[Array, "*B R"],
    *,
    epsilon: float,
    iterations: int,
) -> Float[Array, "*B P R"]:
    """Transport plan that minimises <cost, F> - epsilon * entropy(F), after `iterations` alternating projections.

    An iteration makes the row sums right and then the column sums. It is two products with the kernel
    exp((f + g - cost) / epsilon), much cheaper than two log-sum-exps; every ten iterations the scalings are absorbed
    into the potentials f and g and the kernel is built anew, so that a small epsilon neither overflows nor underflows
    float32 (Schmitzer, arXiv 1610.06519, section 3). The first potentials are the c-transforms of zero, with which
    each row and each column of the kernel has 1 as its largest entry.

    Costs must lie in an interval of length 2, as those of correlations do; an epsilon below 0.01 would then leave the
    range of float32 and raises ValueError.
    """
    if epsilon < 0.01:
        raise ValueError(f"epsilon {epsilon} is below 0.01, which float32 does not hold: use solver 'exact' instead.")

    def kernel(f, g):
        return jnp.exp((f[..., :, None] + g[..., None, :] - cost) / epsilon)

    def project(duals, steps):
        f, g = duals
        k = kernel(f, g)

        def step(_, scalings):
            _, v = scalings
            u = row_mass / jnp.einsum("...ab,...b->...a", k, v, precision="highest")
            return u, column_mass / jnp.einsum("...ab,...a->...b", k, u, precision="highest")

        u, v = jax.lax.fori_loop(0, steps, step, (jnp.ones_like(f), jnp.ones_like(g)))
        return f + epsilon * jnp.log(u), g + epsilon * jnp.log(v)

    f = cost.min(-1)
    g = (cost - f[..., :, None]).min(-2)
    rounds, rest = divmod(iterations, _ABSORB_EVERY)
    duals = jax.lax.fori_loop(0, rounds, lambda _, duals: project(duals, _ABSORB_EVERY), (f, g))
    f, g = project(duals, rest) if rest else duals
    return kernel(f, g)


def exact_plan(
    cost: Float[Array, "*B P R"], row_mass: Float[Array, "*B P"], column_mass: Float[Array, "*B R"]
) -> Float[Array, "*B P R"]:
    """Transport plan of least cost, by linear programming (HiGHS) in float64 on the host, one problem at a time."""
    return jax.pure_callback(_solve_on_host, jax.ShapeDtypeStruct(cost.shape, cost.dtype), cost, row_mass, column_mass)


def _solve_on_host(cost, row_mass, column_mass):
    cost, row_mass, column_mass = (np.asarray(x) for x in (cost, row_mass, column_mass))
    rows, columns = cost.shape[-2:]
    marginals = sparse.vstack(
        [sparse.kron(sparse.eye(rows), np.ones((1, columns))), sparse.kron(np.ones((1, rows)), sparse.eye(columns))]
    ).tocsr()
    plan = np.empty_like(cost)
    for problem in np.ndindex(cost.shape[:-2]):
        w1, w2 = row_mass[problem].astype(np.float64), column_mass[problem].astype(np.float64)
        w2 *= w1.sum() / w2.sum()  # equal totals but for rounding, and a linear programme forgives no rounding
        solution = linprog(cost[problem].ravel(), A_eq=marginals, b_eq=np.concatenate([w1, w2]), method="highs")
        if not solution.success:
            raise ArithmeticError(f"Transport problem {problem} has no solution: {solution.message}")
        plan[problem] = solution.x.reshape(rows, columns)
    return plan


def emd_scores(
    query: Float[Array, "*B N P C"],
    support: Float[Array, "*B M P C"],
    *,
    temperature: float = 12.5,
    solver: str = "sinkhorn",
    epsilon: float = 0.05,
    iterations: int = 50,
) -> Float[Array, "*B N M"]:
    """Similarity of each query map to each support map, about within +-temperature; computed in float32.

    Args:
      query: feature maps with their positions in one axis.
      support: feature maps to compare with.
      temperature: score of two equal maps.
      solver: "sinkhorn", or "exact" for the linear programme on the host (for tests and parity; slow).
      epsilon: entropy weight of Sinkhorn. 0.05 with 50 iterations suits training, 0.02 with 200 evaluation.
      iterations: of Sinkhorn.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver '{solver}' is none of {', '.join(SOLVERS)}.")
    query, support = query.astype(jnp.float32), support.astype(jnp.float32)
    similarity = pearson_similarity(query, support)
    cost, query_mass, support_mass = jax.lax.stop_gradient((1 - similarity, *node_weights(query, support)))
    if solver == "exact":
        plan = exact_plan(cost, query_mass, support_mass)
    else:
        plan = sinkhorn_plan(cost, query_mass, support_mass, epsilon=epsilon, iterations=iterations)
    return temperature / query.shape[-2] * (similarity * jax.lax.stop_gradient(plan)).sum((-2, -1))

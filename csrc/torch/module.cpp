// The pybind11 module sensibert._C: what was built, and the solver, which needs no device. Importing it loads the
// library, whose static initialisers register the CUDA kernels.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "../host/solver.h"

#ifndef SENSIBERT_CUDA
#define SENSIBERT_CUDA ""
#endif
#ifndef SENSIBERT_ARCHITECTURES
#define SENSIBERT_ARCHITECTURES ""
#endif

namespace py = pybind11;

namespace {

py::dict build_info() {
    py::dict info;
    info["architectures"] = py::str(SENSIBERT_ARCHITECTURES).attr("split")();
    info["cuda"] = SENSIBERT_CUDA;
    info["compiler"] = "C++ " __VERSION__;
    info["commit"] = SENSIBERT_COMMIT;
    return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.def("build_info", &build_info, "architectures (empty without CUDA), cuda, compiler, commit");
    m.def("solve_levels", &sensibert::solve_levels, py::arg("costs"), py::arg("values"), py::arg("capacity"));
}

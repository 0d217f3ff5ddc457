// The pybind11 module sensibert._C: what was built. Importing it loads the library, whose static initialisers register
// the CUDA kernels.
#include <pybind11/pybind11.h>

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

PYBIND11_MODULE(_C, m) { m.def("build_info", &build_info, "architectures, cuda, compiler, commit"); }
